"""Kill anything at any time, run the same command again: the same store as without the kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.pipelines.support import (
    contents,
    newest_index,
    recipe_settings,
    run_wealy,
    shards,
    start_wealy,
    wait_for,
    write_recipe,
)
from wealy_ray.errors import StoreError
from wealy_ray.report.status import store_status
from wealy_ray.storage import Storage


def test_a_second_run_decodes_nothing(undisturbed: tuple[Path, dict]) -> None:
    manifest, _ = undisturbed
    folder = manifest.parent
    before = newest_index(folder / "store"), shards(folder / "store")
    began = time.monotonic()
    code, output = run_wealy("extract", folder / "recipe.yaml")
    assert code == 0, output
    assert "nothing was left to do" in output
    assert (newest_index(folder / "store"), shards(folder / "store")) == before
    assert time.monotonic() - began < 60  # no Ray session is started; seconds on an idle machine


def test_shards_that_are_gone_are_made_again(undisturbed: tuple[Path, dict], tmp_path: Path) -> None:
    manifest, expected = undisturbed
    store = tmp_path / "store"
    shutil.copytree(manifest.parent / "store", store)
    gone, damaged, *_ = shards(store)
    gone.unlink()
    damaged.write_bytes(bytes(100))
    status = store_status(Storage(), str(store))
    assert re.search(r"gone +\d+ tracks in 1 shards; `wealy extract` makes them again", status), status
    with pytest.raises(StoreError, match=r"the command that wrote this store .* makes it again"):
        contents(store)
    damaged.unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_settings(manifest, store))
    code, output = run_wealy("extract", recipe)
    assert code == 0, output
    assert re.search(r"\d+ tracks lie in shards that are gone: they are worked on again", output), output
    assert contents(store) == expected
    assert "makes them again" not in store_status(Storage(), str(store))


def test_a_killed_and_a_stopped_driver(undisturbed: tuple[Path, dict], tmp_path: Path) -> None:
    manifest, expected = undisturbed
    store = tmp_path / "store"
    # no index between the claim and the end: what is written is found only by adoption
    lazy = write_recipe(tmp_path / "lazy.yaml", recipe_settings(manifest, store, publish_every_s=1000))
    eager = write_recipe(tmp_path / "eager.yaml", recipe_settings(manifest, store))

    def two_shards() -> bool:
        return len(shards(store)) >= 2

    def five_shards() -> bool:
        return len(shards(store)) >= 5

    process = start_wealy("extract", lazy)
    assert wait_for(two_shards, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert contents(store) == {}, "no index should name the shards yet"

    # a job that is stopped politely publishes first
    process = start_wealy("extract", lazy)
    assert wait_for(five_shards, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "run the same command again" in output
    assert 8 <= len(contents(store)) < len(expected)

    code, output = run_wealy("extract", eager)
    assert code == 0, output
    assert contents(store) == expected


@pytest.mark.heavy
def test_zombie_driver_is_fenced(undisturbed: tuple[Path, dict], tmp_path: Path) -> None:
    manifest, expected = undisturbed
    store = tmp_path / "store"
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_settings(manifest, store))
    zombie = start_wealy("extract", recipe)
    wait_for(lambda: len(shards(store)) >= 2, zombie)
    os.kill(zombie.pid, signal.SIGSTOP)
    try:
        code, output = run_wealy("extract", recipe)
        assert code == 0, output
        assert contents(store) == expected
    finally:
        os.kill(zombie.pid, signal.SIGCONT)
    output, _ = zombie.communicate(timeout=120)
    assert zombie.returncode == 7, output
    assert "another driver has claimed this store" in output
    assert contents(store) == expected


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # a process that ends while we look
        return []


@pytest.mark.heavy
def test_killed_engine_actor_is_replaced(undisturbed: tuple[Path, dict], tmp_path: Path) -> None:
    manifest, expected = undisturbed
    store = tmp_path / "store"
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_settings(manifest, store))
    process = start_wealy("extract", recipe)
    wait_for(lambda: len(shards(store)) >= 2, process)
    engines = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "EngineStage" in " ".join(_command(child))
    ]
    assert engines, "no engine found to kill"
    for engine in engines:
        engine.kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert contents(store) == expected
