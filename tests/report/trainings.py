"""Folders of trainings with given curves, in the shape that `wealy train` leaves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from wealy_ray.training.recipe import TrainRecipe

FACTS = {"model", "loss", "gather", "data", "optimiser", "validation", "mining", "seed"}
COUNTS = {
    "train": {"tracks": 4000, "cliques": 1000, "dropped": 0},
    "validation": {"tracks": 800, "cliques": 200, "dropped": 0},
}
CONFIG = {"digest": "d" * 32, "data": {"languages": {"es": 900, "en": 3100}}, "metrics": {}}


def curves(
    num: int, loss: Callable[[float], float], ap: Callable[[float], float], every: int = 5, **more: Any
) -> list[dict[str, float]]:
    """Entries of `num` epochs; loss and MAP are functions of the share of the training that is done."""
    rng = np.random.default_rng(num)
    entries = []
    for epoch in range(1, num + 1):
        share = epoch / num
        entry = {
            "epoch": float(epoch),
            "loss": loss(share) * (1 + 0.01 * float(rng.normal())),
            "gradient_norm": 0.5 + 0.05 * float(rng.random()),
            "padded_share": 0.05,
            "learning_rate": 1e-4 * 0.5 * (1 + math.cos(math.pi * share)),
        }
        entry |= {name: value(share) if callable(value) else value for name, value in more.items()}
        if epoch % every == 0 or epoch == num:
            entry["map"] = ap(share)
        entries.append(entry)
    return entries


def healthy(num: int = 100, **more: Any) -> list[dict[str, float]]:
    """A loss that goes down all the time, and MAP that grows and levels off late."""

    def ap(share: float) -> float:
        return 0.6 * (1 - math.exp(-3 * share)) - 0.1 * max(0, share - 0.9)

    return curves(num, lambda share: 4.5 - 2.5 * share, ap, **more)


def write_training(
    root: Path,
    entries: Sequence[dict[str, float]] | None,
    *,
    outcome: str | None = "done",
    is_held: bool = False,
    facts: dict[str, Any] | None = None,
    **record: Any,
) -> Path:
    """Writes a folder.

    Args:
        root: The folder.
        entries: Its history; None: no epoch is done.
        outcome: Of the last run; None: it has left no record.
        is_held: Whether this process holds its lease.
        facts: Settings that replace those of the recipe.
        **record: Facts that replace those of the run record.
    """
    root.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "manifest": "s3://songs/manifest.parquet",
        "store": "s3://songs/states",
        "out": str(root),
        "optimiser": {"epochs": len(entries or []) or 100, "warmup_epochs": 5},
        **(facts or {}),
    }
    recipe = TrainRecipe.model_validate(settings).model_dump(mode="json")
    told = {
        "numerics_version": 1,
        "manifest_digest": "m" * 32,
        "extractor_id": "0123456789abcdef",
        "index": 7,
        "passes": recipe["resources"]["passes"],
        **{name: recipe[name] for name in FACTS},
    }
    _write(root / "training.json", told)
    if entries is not None:
        _write(root / "history.json", list(entries))
    if outcome is not None:
        run = {
            "began_at": "2026-01-02T03:04:05+00:00",
            "outcome": outcome,
            "job": "train",
            "recipe": recipe,
            "hardware": {"host": "node-1", "machine": "x86_64", "cpus": 16},
            "versions": {"ray": "2.50.0", "torch": "2.8.0"},
            "counts": COUNTS,
        }
        if outcome != "running":
            run |= {"ended_at": "2026-01-02T05:04:05+00:00", "wall_s": 7200.0, "workers": 4}
            run |= {"tracks_per_s": 812.5, "waited_share": 0.01, "parameters": 12_345_678}
        _write(root / "run.json", run | record)
    if outcome == "done":
        (root / "model").mkdir(exist_ok=True)
        _write(root / "model" / "config.json", CONFIG)
    if is_held:
        write_lease(root, 0.0)
    return root


def write_lease(root: Path, silent_s: float) -> None:
    """A lease of 60 s that this process has renewed some time ago."""
    renewed_at = datetime.now(UTC) - timedelta(seconds=silent_s)
    lease = {"run_id": "r", "host": "elsewhere", "pid": os.getpid(), "renewed_at": renewed_at.isoformat()}
    _write(root / "lease.json", lease | {"lease_s": 60.0})


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
