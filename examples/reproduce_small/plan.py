"""What is trained: every model of the results, as changes to `recipes/reproduce-small-train.yaml`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SEEDS = (0, 1, 2)
WORKS = (13, 26, 52, 104, 172)
"""Training works of the learning curve; the last are all."""

STEPS_PER_EPOCH = 4
"""Of the recipe, with all works in batches of 43."""
EPOCHS, WARMUP_EPOCHS = 40, 4
"""Of the recipe."""

AVERAGE_MLP: dict[str, Any] = {
    "model": {
        "kind": "avg_mlp",
        "width": 512,
        "hidden_layers": 0,
        "dropout": 0.0,
        "output_dim": 256,
        "standardise": True,
    },
    "optimiser": {"learning_rate": 1e-3, "epochs": EPOCHS, "warmup_epochs": WARMUP_EPOCHS},
}
"""What was best of it on held-out training works: more layers, and dropout, were worse."""

SENTENCES: dict[str, Any] = {
    "data.sentences": ".cache/all-MiniLM-L6-v2",
    "data.kinds": None,
    "optimiser.learning_rate": 1e-4,
}
"""WEALY's network on vectors of the transcripts' sentences; the rate was best on held-out training works."""


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
        Variant("MiniLM + Transformer", "systems", SENTENCES),
        *_curve(),
        Variant("loss: triplet, first/first", "ablation", {"loss": {"kind": "triplet"}}),
        Variant("loss: CLEWS", "ablation", {"loss": {"kind": "clews"}}),
        Variant("pooling: mean", "ablation", {"model.pooling": "mean"}),
        Variant("pooling: GeM", "ablation", {"model.pooling": "gem"}),
        Variant("pooling: CLS", "ablation", {"model.pooling": "cls"}),
        Variant("inputs: not standardised", "ablation", {"model.standardise": False}),
        Variant("positions: all", "ablation", {"data.kinds": None}),
        Variant("crop: 50 states", "ablation", {"data.crop": 50}),
    ]


def _curve() -> Iterator[Variant]:
    """With fewer works, epochs have fewer steps: there are more of them, so that all models see as many steps."""
    for works in WORKS[:-1]:
        factor = STEPS_PER_EPOCH // max(1, works // 43)
        epochs = {"epochs": EPOCHS * factor, "warmup_epochs": WARMUP_EPOCHS * factor}
        measured = {"validation": {"every_epochs": EPOCHS * factor}}
        wealy = {f"optimiser.{name}": value for name, value in epochs.items()}
        yield Variant(f"WEALY, {works} works", "curve", wealy | measured, works)
        mlp = {**AVERAGE_MLP, "optimiser": AVERAGE_MLP["optimiser"] | epochs, **measured}
        yield Variant(f"Avg+MLP, {works} works", "curve", mlp, works)
