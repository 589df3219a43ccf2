"""Chaos and scale, too long for CI: `make test-heavy`."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.pipelines.support import (
    contents,
    make_manifest,
    make_tracks,
    recipe_settings,
    run_wealy,
    start_wealy,
    write_recipe,
)

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("seed", range(3))
def test_random_kills_until_done(undisturbed: tuple[Path, dict], tmp_path: Path, seed: int) -> None:
    """Driver, engine, decoder child or writer, at random moments, until a run gets through."""
    manifest, expected = undisturbed
    draw = random.Random(seed)
    store = tmp_path / "store"
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_settings(manifest, store))
    kills = []
    for _ in range(12):
        process = start_wealy("extract", recipe)
        time.sleep(draw.uniform(4, 16))
        if process.poll() is None:
            victims = [p for p in psutil.Process(process.pid).children(recursive=True) if _is_ours(p)]
            victim = draw.choice([psutil.Process(process.pid), *victims])
            kills.append(" ".join(victim.cmdline())[:60])
            os.kill(victim.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        assert process.returncode in (0, -9, 75), output
        if process.returncode == 0:
            break
    assert kills
    code, output = run_wealy("extract", recipe)
    assert code == 0, output
    assert contents(store) == expected, kills


def _is_ours(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return any(mark in command for mark in ("EngineStage", "decode_tracks", "write_tracks", "audio.child"))


def test_two_thousand_tracks(tmp_path: Path) -> None:
    make_tracks(tmp_path / "audio", 2000)
    manifest = make_manifest(tmp_path / "audio", tmp_path / "manifest.parquet")
    resources = {"tracks_per_block": 16, "tracks_per_shard": 64, "engine_gpus": 0}
    settings = recipe_settings(manifest, tmp_path / "store", resources=resources, publish_every_s=20)
    process = start_wealy("extract", write_recipe(tmp_path / "recipe.yaml", settings))
    output, _ = process.communicate(timeout=3600)
    assert process.returncode == 0, output
    assert len(contents(tmp_path / "store")) == 2000
