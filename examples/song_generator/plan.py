"""Which songs there are: works, their versions, splits and every draw but the sound itself."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from examples.song_generator.lyrics import LANGUAGES, THEMES, Lyrics, make_lyrics, rng_of
from examples.song_generator.song import Music, Song, Track

LANGUAGE_MIX = ["en"] * 36 + ["es"] * 16 + ["it"] * 14 + ["de"] * 14
VERSIONS = ["cover", "live", "truncated", "reordered", "long_intro", "cover", "acappella"]
VOICES = {  # (engine, voice), taken in turn by the versions of a work
    "en": [
        ("piper", "joe"),
        ("flite", "slt"),
        ("espeak", ""),
        ("flite", "kal"),
        ("espeak", "m3"),
        ("piper", "joe"),
        ("espeak", "f1"),
    ],
    "es": [("espeak", ""), ("kokoro", "jm_kumo"), ("espeak", "m3"), ("espeak", "f1")],
    "it": [("espeak", ""), ("kokoro", "jm_kumo"), ("espeak", "m3"), ("espeak", "f1")],
    "de": [("espeak", ""), ("kokoro", "jm_kumo"), ("espeak", "m3"), ("espeak", "m1")],
}
PROGRESSIONS = [[0, 4, 5, 3], [5, 3, 0, 4], [0, 5, 3, 4], [0, 3, 4, 3], [5, 4, 3, 4], [0, 2, 3, 4]]
"""Four chords, by degree of the scale; one per bar."""
STYLES = ["pad", "pluck", "organ", "band", "chip"]
FORMATS = ["mp3", "ogg", "m4a", "ogg", "mp3", "mp3", "ogg", "ogg"]
LOSSLESS = {5: "flac", 7: "wav"}
"""Numbers of the two songs of a mixed preset that are not lossy."""


@dataclass(frozen=True)
class Preset:
    """A corpus that can be made again: everything in it follows from `seed` and `prefix`."""

    seed: int
    prefix: str
    """Of every id."""
    num_works: int
    num_train: int
    """Works of the split `train`; the next `num_val` are `val`, the rest is `test`."""
    num_val: int
    format: str | None = None
    """None: a mix."""


PRESETS = {
    "training-songs": Preset(seed=3, prefix="t3", num_works=80, num_train=52, num_val=8),
    "more-songs": Preset(seed=4, prefix="m4", num_works=120, num_train=120, num_val=0, format="opus"),
}


@dataclass(frozen=True)
class _Work:
    music: Music
    language: str
    themes: list[str]
    lyrics: Lyrics
    split: str


def plan_songs(preset: Preset) -> list[Song]:
    """All songs of a preset, by track id."""
    groups = _versions(preset)
    works = _works(preset, [language for language, _ in groups])
    versions = [(number, kind) for number, (_, kinds) in enumerate(groups) for kind in kinds]
    versions += [(number, "parody") for number in range(0, len(works), 7)]
    versions += [(number, "instrumental") for number in range(3, len(works), 11)]
    ids = list(range(len(versions)))
    rng_of(preset.seed, "ids").shuffle(ids)  # a track's id says nothing about its work
    turns: Counter[int] = Counter()
    songs = []
    for (number, kind), track_number in zip(versions, ids, strict=True):
        turns[number] += 1
        turn = number + turns[number]
        songs.append(_song(preset, works, number=number, kind=kind, track_number=track_number, turn=turn))
    return sorted(songs, key=lambda song: song.track.track_id)


def _versions(preset: Preset) -> list[tuple[str, list[str]]]:
    """Language and kinds of the versions of each work: the original and two to four more."""
    rng = rng_of(preset.seed, "plan")
    if preset.num_works == len(LANGUAGE_MIX):
        languages = list(LANGUAGE_MIX)
    else:
        languages = rng.sample(LANGUAGE_MIX * 4, preset.num_works)
    rng.shuffle(languages)
    groups = []
    for number, language in enumerate(languages):
        pool = list(VERSIONS)
        rng.shuffle(pool)
        kinds = ["original", *pool[: rng.choice([2, 2, 3, 3, 4])]]
        if number % 8 == 0:
            others = [other for other in LANGUAGES if other != language]
            kinds[-1] = f"translation:{rng.choice(others)}"
        groups.append((language, kinds))
    return groups


def _works(preset: Preset, languages: list[str]) -> list[_Work]:
    rng = rng_of(preset.seed, "works")
    works = []
    for number, language in enumerate(languages):
        work = f"{preset.prefix}w{number:02d}"
        themes = rng.sample(list(THEMES), 2)
        music = Music(
            work=work,
            key=rng.randrange(12),
            mode=rng.choice(["major", "minor"]),
            progression=rng.choice(PROGRESSIONS),
            bpm=rng.randrange(84, 128, 4),
        )
        lyrics = make_lyrics(rng_of(preset.seed, work, "lyrics"), themes)
        works.append(_Work(music, language, themes, lyrics, _split(preset, number)))
    return works


def _split(preset: Preset, number: int) -> str:
    if number < preset.num_train:
        return "train"
    return "val" if number < preset.num_train + preset.num_val else "test"


def _song(
    preset: Preset, works: list[_Work], *, number: int, kind: str, track_number: int, turn: int
) -> Song:
    work = works[number]
    kind, _, target = kind.partition(":")
    language = target or work.language
    engine, voice = VOICES[language][turn % len(VOICES[language])]
    lyrics, lyrics_id = work.lyrics, work.music.work
    if kind == "parody":
        lyrics_id += "P"
        themes = works[(number + 3) % len(works)].themes
        lyrics = make_lyrics(rng_of(preset.seed, lyrics_id, "lyrics"), themes)
    is_sung = kind != "instrumental"
    plain = kind in ("original", "parody", "instrumental")
    audio_format = preset.format or LOSSLESS.get(track_number) or FORMATS[track_number % len(FORMATS)]
    track_id = f"{preset.prefix}t{track_number:03d}"
    rng = rng_of(preset.seed, track_id)  # drawn from in the order of the lines below
    track = Track(
        track_id=track_id,
        work=work.music.work,
        lyrics_id=lyrics_id if is_sung else None,
        split=work.split,
        kind=kind,
        language=language if is_sung else None,
        themes=work.themes,
        engine=engine if is_sung else None,
        voice=voice if is_sung else None,
        register="low" if rng.random() < 0.5 else "high",
        sung=0.0 if kind == "acappella" else rng.choice([0.0, 0.35, 0.6]),
        tempo=1.0 if plain else round(rng.uniform(0.88, 1.14), 3),
        stretch=round(rng.uniform(0.98, 1.15), 3),
        warp=round(rng.uniform(0.93, 1.08), 3),
        transpose=0 if plain else rng.choice([-3, -2, 0, 2, 4]),
        style=rng.choice(STYLES),
        snr_db=_snr_db(kind, rng),
        intro_s=round(rng.uniform(12, 20), 1),
        format=audio_format,
        sample_rate={"wav": 22050, "opus": 48000}.get(audio_format) or rng.choice([22050, 44100, 48000]),
        channels=1 if audio_format in ("wav", "flac", "opus") else rng.choice([1, 2]),
    )
    return Song(track, work.music, lyrics, preset.seed)


def _snr_db(kind: str, rng: random.Random) -> float:
    drawn = rng.choice([12.0, 9.0, 6.0])
    return 6.0 if kind == "live" else drawn
