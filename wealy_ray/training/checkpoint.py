"""What a training goes on from: everything that the next step depends on, in one folder.

model.safetensors   weights and input statistics
state.pt            optimiser, place in the run, best score, mined neighbours; tensors and plain values only
facts.json          recipe, extractor and index: a checkpoint of another training is refused
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wealy_ray.errors import StoreError


@dataclass
class Progression:
    """Where a training is.

    Attributes:
        epoch: Epochs that are done.
        step: Steps of the next epoch that are done.
        best_map: Best validation MAP so far; -1 before the first.
        best_epoch: Epochs that were done then.
        measured_without_gain: Measurements since.
        history: One entry per measurement and epoch: losses, MAPs, rates.
        neighbours: Mined cliques, int64 [num_cliques, K]; None without mining.
        sums: What the running epoch adds up: loss, steps, padded positions.
    """

    epoch: int = 0
    step: int = 0
    best_map: float = -1.0
    best_epoch: int = -1
    measured_without_gain: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    neighbours: Tensor | None = None
    sums: dict[str, float] = field(default_factory=dict)


def write_checkpoint(
    folder: Path,
    weights: dict[str, Tensor],
    optimiser: dict[str, Any],
    progression: Progression,
    facts: dict[str, Any],
) -> None:
    """Writes a checkpoint into an empty folder."""
    save_file({n: t.detach().cpu().contiguous() for n, t in weights.items()}, folder / "model.safetensors")
    torch.save({"optimiser": optimiser, "progression": vars(progression)}, folder / "state.pt")
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def read_checkpoint(
    folder: Path, facts: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], Progression]:
    """Weights, optimiser and progression.

    Raises:
        StoreError: The checkpoint is of another training, or damaged.
    """
    try:
        found = json.loads((folder / "facts.json").read_text())
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        weights = load_file(folder / "model.safetensors")
    except Exception as e:  # torch and safetensors raise errors of many kinds for what they cannot read
        raise StoreError(
            f"the checkpoint {folder} is damaged ({type(e).__name__}): remove it, or start anew"
        ) from e
    differing = sorted(name for name in facts.keys() | found.keys() if facts.get(name) != found.get(name))
    if differing:
        raise StoreError(
            f"the checkpoint in {folder} is of another training: {', '.join(differing)} differ; give this one another "
            "`out`, or go back to the old recipe"
        )
    return weights, state["optimiser"], Progression(**state["progression"])
