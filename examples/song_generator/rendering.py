"""Puts one song together: lines on the beat, accompaniment below them, an encoded file."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np

from examples.song_generator.accompaniment import accompany, reverberate
from examples.song_generator.lyrics import rng_of
from examples.song_generator.singing import sing
from examples.song_generator.song import Song
from examples.song_generator.voices import SAMPLE_RATE_HZ, run_program, speak

REGISTER_HZ = {"low": 115, "high": 205}
MELODY = [0, 2, 4, 5, 7, 7, 9]
"""Semitones that a melody is drawn from."""
NOTES_PER_LINE = 6
PAUSE_S = 0.12
SHORTEST_S = 30.5
"""A song fills Whisper's window of 30 s."""
CODECS = {
    "wav": ["-c:a", "pcm_s16le"],
    "flac": ["-c:a", "flac"],
    "ogg": ["-c:a", "libvorbis", "-q:a", "2"],
    "mp3": ["-c:a", "libmp3lame", "-b:a", "48k"],
    "m4a": ["-c:a", "aac", "-b:a", "48k"],
    "opus": ["-c:a", "libopus", "-b:a", "32k"],
}


def render(song: Song) -> np.ndarray:
    """The song's samples, float32 [num_samples] at `SAMPLE_RATE_HZ`, peak .89."""
    track = song.track
    rng = rng_of(song.seed, track.track_id, "render")
    bpm = song.music.bpm * track.tempo
    vocals = _sing_all(song, half_bar_s=2 * 60 / bpm, rng=rng)
    if track.kind == "acappella":
        mix = reverberate(vocals, rng, duration_s=0.4, wet=0.15)
    else:
        band = accompany(len(vocals), song.music, track.style, transpose=track.transpose, bpm=bpm, rng=rng)
        mix = band if track.kind == "instrumental" else _mix(vocals, band, song, rng)
    return mix / (np.abs(mix).max() + 1e-9) * 0.89


def encode(samples: np.ndarray, song: Song) -> bytes:
    """The song's file, with nothing in it that differs from run to run."""
    track = song.track
    pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    exact = ["-map_metadata", "-1", "-fflags", "+bitexact", "-flags:a", "+bitexact", "-threads", "1"]
    source = ["-f", "s16le", "-ar", str(SAMPLE_RATE_HZ), "-ac", "1", "-i", "-"]
    target = ["-ar", str(track.sample_rate), "-ac", str(track.channels), *CODECS[track.format]]
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # not a pipe: some containers are finished at their beginning
        path = Path(folder) / f"song.{track.format}"
        run_program(["ffmpeg", "-v", "error", *source, *exact, *target, str(path)], pcm)
        return path.read_bytes()


def _sing_all(song: Song, half_bar_s: float, rng: random.Random) -> np.ndarray:
    """All lines, each beginning on a half bar, float32 [num_samples]; silence for an instrumental."""
    track = song.track
    base_hz = REGISTER_HZ[track.register] * 2 ** (track.transpose / 24)  # singers follow half of the way
    at_s = {"long_intro": track.intro_s, "acappella": 0.3}.get(track.kind, 2 * half_bar_s)
    starts_s, parts = [], []
    known: dict[str, np.ndarray] = {}
    for section, number, words in song.sung_lines():
        if words not in known:
            # the melody belongs to the music: every version of the work sings it, in whatever words
            melody = rng_of(song.music.work, section, number)
            known[words] = sing(
                speak(str(track.engine), str(track.voice), str(track.language), words),
                [melody.choice(MELODY) for _ in range(NOTES_PER_LINE)],
                sung=track.sung,
                base_hz=base_hz,
                stretch=track.stretch,
                warp=track.warp,
            )
        starts_s.append(at_s)
        parts.append(known[words])
        at_s += np.ceil((len(known[words]) / SAMPLE_RATE_HZ + PAUSE_S) / half_bar_s) * half_bar_s
    shortest_s = 32 + 8 * rng.random() if track.kind == "instrumental" else SHORTEST_S
    vocals = np.zeros(int(max(at_s + half_bar_s, shortest_s) * SAMPLE_RATE_HZ), np.float32)
    for start_s, part in zip(starts_s, parts, strict=True):
        start = int(start_s * SAMPLE_RATE_HZ)
        vocals[start : start + len(part)] += part[: len(vocals) - start]
    return vocals


def _mix(vocals: np.ndarray, band: np.ndarray, song: Song, rng: random.Random) -> np.ndarray:
    """Vocals above the band by the song's `snr_db`, measured where somebody sings."""
    singing = np.abs(vocals) > 0.02
    loudness = np.sqrt((vocals[singing] ** 2).mean()) / np.sqrt((band**2).mean())
    gain = loudness * 10 ** (-song.track.snr_db / 20)
    if song.track.kind == "live":  # a hall, and the noise of an audience
        vocals = reverberate(vocals, rng, duration_s=0.9, wet=0.35)
        noise = np.random.default_rng(rng.randrange(2**31))
        band = band + 0.05 * noise.standard_normal(len(band)).astype(np.float32)
    return vocals + gain * band
