"""The zoo of bad audio beside good tracks, in one run; poison for the engine; retry-failed and status."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.chaos.chaos_markers import CRASH, HANG, MEMORY, poison
from tests.pipelines.support import (
    REPOSITORY,
    call_wealy,
    contents,
    make_manifest,
    make_tracks,
    recipe_settings,
    run_wealy,
    write_recipe,
    write_wav,
)
from wealy_ray.catalog import read_manifest, write_manifest
from wealy_ray.storage import Storage
from wealy_ray.store import StoreReader

CHAOS = {"PYTHONPATH": str(REPOSITORY / "tests" / "chaos")}
NOISE = 0.2 * np.random.default_rng(5).normal(size=16_000)


def _float_wav(path: Path, samples: np.ndarray) -> None:
    data = samples.astype("<f4").tobytes()
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, 16_000, 64_000, 4, 32)
    body = b"WAVE" + fmt + struct.pack("<4sI", b"data", len(data)) + data
    path.write_bytes(struct.pack("<4sI", b"RIFF", len(body)) + body)


def make_zoo(folder: Path) -> dict[str, str | None]:
    """Files with the error type that each must end with; None: it must be ok."""
    good = write_wav(folder / "good.wav", NOISE).read_bytes()
    write_wav(folder / "silence.wav", np.zeros(16_000))
    write_wav(folder / "no_samples.wav", np.zeros(0))
    (folder / "empty.mp3").write_bytes(b"")
    (folder / "text.mp3").write_text("la la la, this is no song at all\n" * 200)
    (folder / "truncated.wav").write_bytes(good[: len(good) // 2])
    (folder / "crash.wav").write_bytes(poison(good, CRASH))
    (folder / "hang.wav").write_bytes(poison(good, HANG))
    (folder / "memory.wav").write_bytes(poison(good, MEMORY))
    _float_wav(folder / "nan.wav", np.where(np.arange(16_000) == 8_000, np.nan, NOISE))
    (folder / "vanishing.wav").write_bytes(good)
    return {
        "good.wav": None,
        "silence.wav": None,
        "truncated.wav": None,
        "no_samples.wav": "zero_duration",
        "empty.mp3": "empty_file",
        "text.mp3": "not_audio",
        "crash.wav": "decoder_crashed",
        "hang.wav": "decoder_timeout",
        "memory.wav": "decoder_out_of_memory",
        "nan.wav": "invalid_samples",
        "vanishing.wav": "missing_object",
    }


@pytest.mark.usefixtures("ray_session")
def test_zoo_among_good_tracks(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    make_tracks(audio, 4)
    expected = make_zoo(audio) | {f"t{i:03d}.wav": None for i in range(4)}
    manifest = make_manifest(audio, tmp_path / "manifest.parquet")
    (audio / "vanishing.wav").unlink()
    settings = recipe_settings(
        manifest,
        tmp_path / "store",
        audio={"decode_timeout_s": 4, "decode_memory_mb": 300},
        max_failure_rate=1,
        resources={"tracks_per_block": 20, "tracks_per_shard": 20, "engine_gpus": 0},
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", settings)
    code, output = run_wealy("extract", recipe, env=CHAOS)
    assert code == 0, output
    found = contents(tmp_path / "store")
    assert {track_id: row[1] for track_id, row in found.items()} == expected
    reader = StoreReader.open(Storage(), str(tmp_path / "store"))
    (warning,) = reader.track("truncated.wav").warnings
    assert warning.startswith("truncated after 0.5")
    assert reader.track("silence.wav").num_states > 0
    assert all(reader.track(name).error_message for name, kind in expected.items() if kind)

    # status needs neither Ray nor the recipe
    code, output = call_wealy("status", tmp_path / "store")
    assert code == 0
    assert "15 = 7 ok + 8 failed" in output
    assert "hang.wav: decoder_timeout" in output

    # what was mended outside becomes ok, nothing else is touched
    write_wav(audio / "vanishing.wav", NOISE)
    good_before = {k: v for k, v in found.items() if v[0] == "ok"}
    code, output = call_wealy("retry-failed", recipe, "max_failure_rate=0.1")
    assert code == 8, output  # 4 of 15 still fail: without chaos the decoder plays the three poisoned files
    assert "more than max_failure_rate = 0.1" in output
    again = contents(tmp_path / "store")
    assert again["vanishing.wav"][0] == "ok"
    assert {k: again[k] for k in good_before} == good_before
    assert {k for k, v in again.items() if v[0] == "failed"} == {
        "no_samples.wav",
        "empty.mp3",
        "text.mp3",
        "nan.wav",
    }


def test_track_that_kills_its_engine_fails_alone(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    make_tracks(audio, 10)
    # the length that `tests/chaos` kills an engine for
    write_wav(audio / "poison.wav", NOISE[:12_345])
    manifest = make_manifest(audio, tmp_path / "manifest.parquet")
    settings = recipe_settings(
        manifest,
        tmp_path / "store",
        max_failure_rate=0.2,
        resources={"tracks_per_block": 4, "tracks_per_shard": 4, "engine_gpus": 0, "engine_restarts": 1},
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", settings)
    code, output = run_wealy("extract", recipe, env={**CHAOS, "WEALY_TEST_KILL_ENGINE_AT_SAMPLES": "12345"})
    assert code == 0, output
    found = contents(tmp_path / "store")
    assert len(found) == 11
    assert found["poison.wav"][:2] == ("failed", "engine_crashed")
    assert {k for k, v in found.items() if v[0] == "ok"} == {f"t{i:03d}.wav" for i in range(10)}
    assert "killed its engine, alone, 2 times" in output


@pytest.mark.usefixtures("ray_session")
def test_changed_audio_is_done_again_and_nothing_else(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    make_tracks(audio, 3)
    manifest = make_manifest(audio, tmp_path / "manifest.parquet")
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_settings(manifest, tmp_path / "store"))
    assert call_wealy("extract", recipe)[0] == 0
    before = contents(tmp_path / "store")
    write_wav(audio / "t001.wav", NOISE[:9_000])
    make_manifest(audio, manifest)
    code, output = call_wealy("extract", recipe)
    assert code == 0, output
    assert "done before  2 tracks" in output
    after = contents(tmp_path / "store")
    assert {k for k in after if after[k] != before[k]} == {"t001.wav"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_local_file_is_its_own_fault(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    make_tracks(audio, 2)
    manifest = make_manifest(audio, tmp_path / "manifest.parquet")
    (audio / "t000.wav").chmod(0)
    settings = recipe_settings(manifest, tmp_path / "store", max_failure_rate=1)
    assert run_wealy("extract", write_recipe(tmp_path / "recipe.yaml", settings))[0] == 0
    assert contents(tmp_path / "store")["t000.wav"][1] == "forbidden_object"


def test_distractors_and_order_survive(tmp_path: Path) -> None:
    make_tracks(tmp_path / "audio", 2)
    manifest = make_manifest(tmp_path / "audio", tmp_path / "manifest.parquet")
    table = read_manifest(Storage(), str(manifest)).table
    assert table["clique_id"].null_count == 2
    write_manifest(Storage(), str(manifest), table.take([1, 0]))
    assert read_manifest(Storage(), str(manifest)).table["track_id"].to_pylist() == ["t001.wav", "t000.wav"]
