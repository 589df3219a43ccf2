"""Running `wealy extract` as a user does, and watching it from outside."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.pipelines.support import environment

ROOT = Path(__file__).parents[2]
STAGES = {
    "engine": "EngineStage",
    "decode": "decode_tracks",
    "decoder child": "wealy_ray.audio.child",
    "writer": "write_tracks",
    "raylet": "raylet/raylet",
    "driver": "wealy_ray extract",
}


def sample_songs(count: int) -> list[Path]:
    """The first `count` sample songs."""
    return sorted((ROOT / "examples/songs/audio").iterdir())[:count]


def link_songs(songs: list[Path], folder: Path, repeat: int = 1) -> list[Path]:
    """Fill a folder with links to the songs, `repeat` times under different names."""
    folder.mkdir(parents=True)
    links = [folder / f"{i}-{song.name}" for i in range(repeat) for song in songs]
    for link, song in zip(links, songs * repeat, strict=True):
        link.symlink_to(song)
    return links


def run_extract(settings: dict[str, Any], folder: Path, *, watch_memory: bool) -> dict[str, Any]:
    """Runs `wealy extract`: seconds by phase, and memory by stage.

    Args:
        settings: The recipe.
        folder: Where it is written.
        watch_memory: Reading the memory of some thirty processes each second costs the cores that are measured.
    """
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    store = Path(settings["store"])
    began_s = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "wealy_ray", "extract", str(recipe)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    engine_began_s, samples = 0.0, []
    while process.poll() is None:
        if not engine_began_s and any(store.glob("*/flight/*.json")):
            engine_began_s = time.time()
        if watch_memory:
            samples.append({"at_s": time.time() - began_s, **memory_by_stage(process.pid)})
        try:
            process.wait(1.0 if engine_began_s else 0.05)
        except subprocess.TimeoutExpired:
            continue
    wall_s = time.time() - began_s
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"the pipeline failed:\n{output}")
    ended_s = max(path.stat().st_mtime for path in store.glob("*/shards/*.parquet"))
    return {
        "startup_s": engine_began_s - began_s,
        "work_s": ended_s - engine_began_s,
        "wall_s": wall_s,
        "memory": samples,
        "engine": json.loads(next(store.glob("*/runs/*/run.json")).read_text())["engine"],
    }


def memory_by_stage(pid: int) -> dict[str, float]:
    """Private memory in MiB of a job's processes, summed by stage."""
    sums = dict.fromkeys([*STAGES, "other"], 0.0)
    for process in _tree(pid):
        try:
            command = " ".join(process.cmdline())
            stage = next((name for name, mark in STAGES.items() if mark in command), "other")
            sums[stage] += process.memory_full_info().uss / 2**20
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return sums


def _tree(pid: int) -> Iterator[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        yield from [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
