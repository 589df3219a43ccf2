"""Tracks through the engine's stage, by both window plans, and what a run says of its engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.pipelines.support import (
    call_wealy,
    contents,
    make_manifest,
    recipe_settings,
    write_recipe,
    write_wav,
)
from tests.whisper.support import tiny_model
from wealy_ray.config import ExtractRecipe
from wealy_ray.errors import TrackError
from wealy_ray.pipelines.engine_stage import Heard, decode_options, hear, ok_track
from wealy_ray.storage import Storage
from wealy_ray.store import StoreReader
from wealy_ray.whisper import Engine, EngineOptions, Kind, ReferenceOptions, transcribe_tracks

FIELDS: dict[str, Any] = {
    "track_id": "t",
    "audio_uri": "t.wav",
    "audio_etag": None,
    "audio_size": None,
    "manifest_etag": None,
    "warnings": [],
}


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def song(seconds: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    loudness = np.repeat(draw.uniform(0.02, 0.3, int(seconds) + 1), 16_000)[: int(16_000 * seconds)]
    return (draw.standard_normal(int(16_000 * seconds)) * loudness).astype(np.float32)


def heard(samples: np.ndarray, **settings: Any) -> Heard:
    recipe = ExtractRecipe(manifest="m", store="s", **settings)
    options = EngineOptions(device="cpu", num_slots=3)
    with Engine(tiny_model(), options, decode_options(recipe)) as engine:
        return asyncio.run(hear(engine, samples, recipe))


def test_fixed_windows_lie_where_the_plan_says() -> None:
    track = ok_track(FIELDS, 61.0, heard(song(61.0), decode={"max_tokens": 4}), 64)
    assert [(w.start_s, w.end_s) for w in track.windows] == [(0, 30), (25, 55), (50, 61)]
    assert track.num_states == len(track.kind) == len(track.window) == 3 * (4 + 4 - 1)
    assert list(np.unique(track.window)) == [0, 1, 2]


def test_reference_windows_lie_where_the_text_ends() -> None:
    samples = song(70.0)
    settings = {"windows": {"plan": "reference", "temperatures": [0.0]}, "decode": {"max_tokens": 20}}
    track = ok_track(FIELDS, 70.0, heard(samples, **settings), 64)
    recipe = ExtractRecipe(manifest="m", store="s", **settings)
    with Engine(tiny_model(), EngineOptions(device="cpu", num_slots=3), decode_options(recipe)) as engine:
        (transcript,) = transcribe_tracks(engine, [samples], ReferenceOptions(temperatures=(0.0,)))
    assert [w.start_s for w in track.windows] == [span.seek / 100 for span in transcript.spans]
    assert track.windows[-1].end_s == 70.0
    assert track.text == transcript.text.strip()
    assert [w.text for w in track.windows] == [result.text for result in transcript.results]
    assert track.language == transcript.language.code
    np.testing.assert_array_equal(track.kind, np.concatenate([result.kinds for result in transcript.results]))
    assert {Kind.PROMPT, Kind.SOT, Kind.TEXT, Kind.TIMESTAMP} <= set(track.kind)


def test_a_track_too_short_for_a_window_of_the_reference_plan_has_no_states() -> None:
    track = ok_track(FIELDS, 0.005, heard(song(1.0)[:80], windows={"plan": "reference"}), 64)
    assert (track.status, track.num_states, track.dim, track.windows, track.text) == ("ok", 0, 64, (), "")


def test_a_loop_that_was_cut_is_a_warning_of_its_track() -> None:
    found = heard(song(20.0), decode={"max_repeats": 2, "language": "en"})
    track = ok_track(FIELDS, 20.0, found, 64)
    count = len(found.results[0].tokens)
    assert track.warnings == (f"window 0 repeated itself and was ended after {count} tokens",)
    assert count < 224


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_states_that_float16_cannot_hold_are_never_stored(value: float) -> None:
    found = heard(song(5.0), decode={"max_tokens": 3})
    found.results[0].states[2, 7] = value
    with pytest.raises(TrackError, match="NaN, or too large for float16"):
        ok_track(FIELDS, 5.0, found, 64)


def test_a_run_of_the_reference_plan(tmp_path: Path) -> None:
    for number, seconds in enumerate((33.0, 41.5, 8.0)):
        write_wav(tmp_path / "audio" / f"t{number}.wav", song(seconds, seed=number))
    settings = recipe_settings(
        make_manifest(tmp_path / "audio", tmp_path / "m.parquet"),
        tmp_path / "store",
        windows={"plan": "reference", "pad_to_s": 35, "temperatures": [0.0, 1.0]},
        decode={"initial_prompt": "lyrics:", "max_tokens": 12},
    )
    recipe = write_recipe(tmp_path / "r.yaml", settings)
    code, output = call_wealy("extract", recipe)
    assert code == 0, output
    assert "3 = 3 ok + 0 failed" in output
    (root,) = (tmp_path / "store").iterdir()
    spec = json.loads((root / "extractor.json").read_text())
    assert spec["windows"]["plan"] == "reference"
    assert spec["windows"]["pad_to_s"] == 35
    assert spec["decode"]["timestamps"] is True
    assert spec["decode"]["initial_prompt"] == "lyrics:"
    reader = StoreReader.open(Storage(), str(tmp_path / "store"))
    windows = 0
    for track_id in reader.index.table["track_id"].to_pylist():
        track = reader.track(track_id)
        windows += len(track.windows)
        assert len(track.windows) >= 2  # padded to 35 s
        assert {w.temperature for w in track.windows} <= {0.0, 1.0}
        assert track.kind[0] == Kind.PROMPT
    (run,) = (root / "runs").iterdir()
    engine = json.loads((run / "run.json").read_text())["engine"]
    assert engine["engines"] == 1
    assert engine["windows"] >= windows  # attempts that were refused count as well
    assert 0 < engine["slot_utilisation"] <= 1
    assert engine["slot_utilisation"] == round(engine["live_slot_steps"] / engine["slot_steps"], 4)
    assert f"slots {engine['slot_utilisation']:.0%} busy" in output
    before = contents(tmp_path / "store")
    assert call_wealy("extract", recipe)[0] == 0
    assert contents(tmp_path / "store") == before
