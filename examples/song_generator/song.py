"""A song as it is planned: its row of the manifest, its music and its lyrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from examples.song_generator.lyrics import Lyrics

ORDER = {
    "original": ["V1", "C", "V2", "C"],
    "cover": ["V1", "C", "V2"],
    "live": ["V1", "C", "V2"],
    "truncated": ["V1", "C"],
    "reordered": ["C", "V2", "V1"],
    "long_intro": ["V1", "C"],
    "acappella": ["V1", "C", "V2"],
    "translation": ["V1", "C", "V2"],
    "parody": ["V1", "C", "V2"],
    "instrumental": [],
}
"""Sections that each kind of version sings."""


@dataclass(frozen=True)
class Music:
    """What all versions of a work have in common besides their lyrics."""

    work: str
    key: int
    mode: str
    progression: list[int]
    bpm: int


@dataclass(frozen=True)
class Track:
    """One line of the manifest, as far as it is known before the song is made."""

    track_id: str
    work: str
    lyrics_id: str | None
    """The clique: versions share it. A parody has the music of its work and other lyrics."""
    split: str
    kind: str
    language: str | None
    themes: list[str]
    engine: str | None
    voice: str | None
    register: str
    sung: float
    """0: the voice keeps its own intonation; 1: it would follow the melody exactly."""
    tempo: float
    stretch: float
    warp: float
    """Factor of the formants: another throat."""
    transpose: int
    """Semitones of the accompaniment."""
    style: str
    snr_db: float
    """Voice against accompaniment."""
    intro_s: float
    """Used by `long_intro`."""
    format: str
    sample_rate: int
    channels: int


@dataclass(frozen=True)
class Song:
    """All that rendering needs to know."""

    track: Track
    music: Music
    lyrics: Lyrics
    seed: int

    @property
    def path(self) -> str:
        """Of the audio, relative to the manifest."""
        return f"audio/{self.track.track_id}.{self.track.format}"

    def sung_lines(self) -> Iterator[tuple[str, int, str]]:
        """Section, number within it and words of each line that is sung."""
        for section in ORDER[self.track.kind]:
            for number, line in enumerate(self.lyrics[section]):
                yield section, number, line.words(str(self.track.language))

    def planned_row(self) -> dict[str, Any]:
        """The manifest's row, less what only the finished song tells."""
        return asdict(self.track) | {
            "path": self.path,
            "lyrics": [words for _, _, words in self.sung_lines()],
        }
