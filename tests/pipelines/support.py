"""Small audio, recipes, and runs of `wealy` in processes of their own, as a user starts them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tests.s3_server import DIE_WITH_PARENT
from wealy_ray import cli
from wealy_ray.catalog import manifest_from_folder, write_manifest
from wealy_ray.model import ModelConfig, TransformerSettings, build_model, digest_of, save_model
from wealy_ray.storage import Storage
from wealy_ray.store import StoreReader

REPOSITORY = Path(__file__).parents[2]
RUN_LIMIT_S = 240.0


def write_wav(path: Path, samples: np.ndarray, rate_hz: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate_hz)
        f.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def make_tracks(folder: Path, count: int, *, seconds: float = 1.0) -> None:
    """Short tracks that differ: noise of different colour and length."""
    for i in range(count):
        rng = np.random.default_rng(i)
        num_samples = int(16_000 * seconds) + 160 * (i % 7)
        noise = np.cumsum(rng.normal(size=num_samples)) if i % 2 else rng.normal(size=num_samples)
        write_wav(folder / f"t{i:03d}.wav", 0.3 * noise / np.abs(noise).max())


def make_manifest(folder: Path, out: Path) -> Path:
    storage = Storage()
    write_manifest(storage, str(out), manifest_from_folder(storage, str(folder)))
    return out


def recipe_settings(manifest: Path | str, store: Path | str, **changes: Any) -> dict[str, Any]:
    """A recipe for the tiny random-weight model; `changes` replace whole sections."""
    settings: dict[str, Any] = {
        "manifest": str(manifest),
        "store": str(store),
        "model": "random-tiny",
        "decode": {"language": "en", "max_tokens": 12},
        "engine": {"num_slots": 4, "device": "cpu"},
        "resources": {"tracks_per_block": 4, "tracks_per_shard": 4, "engine_gpus": 0},
        "publish_every_s": 1,
        "progress_every_s": 1,
        "lease_s": 3,
    }
    return settings | changes


def write_recipe(path: Path, settings: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(settings)))
    return path


def environment(**changes: str) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return {**keep, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1", **changes}


def start_wealy(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "wealy_ray", *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, "-c", DIE_WITH_PARENT, *command],  # a failed test must not leave a driver behind
        cwd=REPOSITORY,
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_wealy(*arguments: str | Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    process = start_wealy(*arguments, env=env)
    try:
        output, _ = process.communicate(timeout=RUN_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"wealy {' '.join(map(str, arguments))} hangs:\n{output}") from None
    return process.returncode, output


def call_wealy(*arguments: str | Path) -> tuple[int, str]:
    """As `run_wealy`, but in this process and its Ray session: seconds less, where no process is to be killed."""
    output = io.StringIO()
    handler, logger = logging.StreamHandler(output), logging.getLogger("wealy_ray")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = cli.run([str(argument) for argument in arguments])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return code, output.getvalue()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], limit_s: float = 120.0) -> bool:
    """Waits until the condition holds (True) or the process has ended (False)."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"waited {limit_s} s in vain; the process says\n{process.communicate()[0]}")


def save_test_model(folder: Path, extractor_id: str, dim: int, **facts: Any) -> None:
    """An untrained network as a model directory."""
    torch.manual_seed(0)
    settings = TransformerSettings(width=64, layers=2, heads=2, feed_forward=64, output_dim=8)
    network = build_model(settings, dim)
    config = ModelConfig(
        model=settings,
        input_dim=dim,
        digest=digest_of(network.state_dict(), settings),
        extractor_id=extractor_id,
        **{"crop": 40, **facts},
    )
    save_model(Storage(), str(folder), network, config, "# A model\n")


def contents(store: Path | str, storage: Storage | None = None) -> dict[str, tuple[Any, ...]]:
    """Everything that a store says of each track, verified, without what may differ from run to run."""
    reader = StoreReader.open(storage or Storage(), str(store))
    found = {}
    for track_id in reader.index.table["track_id"].to_pylist():
        track = reader.track(track_id)
        assert track.track_id == track_id
        digest = hashlib.sha256(track.states.tobytes() + track.token_ids.tobytes() + track.kind.tobytes())
        found[track_id] = (track.status, track.error_type, track.num_states, track.text, digest.hexdigest())
    return found


def shards(store: Path) -> list[Path]:
    return sorted(store.glob("*/shards/*.parquet"))


def newest_index(store: Path) -> int:
    return max((int(p.stem) for p in store.glob("*/index/*.parquet")), default=0)
