"""What is trained: every model of the results, as changes to `recipes/reproduce-small-train.yaml`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SEEDS = (0, 1, 2)
WORKS = (13, 26, 52, 104, 172)
"""Training works of the learning curve; the last are all."""

AVERAGE_MLP: dict[str, Any] = {
    "model": {
        "kind": "avg_mlp",
        "width": 512,
        "hidden_layers": 1,
        "dropout": 0.5,
        "output_dim": 256,
        "standardise": True,
    },
    "optimiser.learning_rate": 2e-3,
}


@dataclass(frozen=True)
class Variant:
    """One model of the results.

    Attributes:
        name: What it is called in tables.
        group: Which table it stands in.
        changes: Settings that differ from the recipe.
        works: Training works; None: all.
    """

    name: str
    group: str
    changes: dict[str, Any] = field(default_factory=dict)
    works: int | None = None


def variants() -> list[Variant]:
    """All models, the most wanted ones first."""
    return [
        Variant("WEALY", "systems"),
        Variant("Avg+MLP", "systems", AVERAGE_MLP),
        *_curve(),
        Variant("loss: triplet, first", "ablation", {"loss": {"kind": "triplet"}}),
        Variant("loss: triplet, hardest", "ablation", {"loss": {"kind": "triplet", "choice": "hardest"}}),
        Variant("loss: CLEWS", "ablation", {"loss": {"kind": "clews"}}),
        Variant("temperature: 0.1, as the paper", "ablation", {"loss.temperature": 0.1}),
        Variant("pooling: GeM, as the paper", "ablation", {"model.pooling": "gem"}),
        Variant("pooling: CLS", "ablation", {"model.pooling": "cls"}),
        Variant("inputs: not standardised, as the paper", "ablation", {"model.standardise": False}),
        Variant("positions: all, as the paper", "ablation", {"data.kinds": None}),
        Variant("crop: 50 states", "ablation", {"data.crop": 50}),
        Variant("crop: 25 states", "ablation", {"data.crop": 25}),
    ]


def _curve() -> Iterator[Variant]:
    for works in WORKS[:-1]:
        yield Variant(f"WEALY, {works} works", "curve", works=works)
        yield Variant(f"Avg+MLP, {works} works", "curve", AVERAGE_MLP, works)
