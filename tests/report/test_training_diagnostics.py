"""Each cause is named, alone, from curves that have it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.trainings import COUNTS, curves, healthy, write_training
from wealy_ray.report.training_diagnostics import diagnose_training
from wealy_ray.report.training_run import Training
from wealy_ray.storage import Storage

Curve = Callable[[float], float]


def found(root: Path, entries: list[dict[str, float]], **more: Any) -> list[str]:
    return diagnose_training(Training.read(Storage(), str(write_training(root, entries, **more))))


def falling(share: float) -> float:
    return 4.5 - 2.5 * share


@pytest.mark.parametrize(
    ("loss", "ap", "said"),
    [
        # a loss that levels off early
        (
            lambda s: 2 + 2.5 * math.exp(-40 * s),
            lambda s: 0.3 * (1 - math.exp(-30 * s)),
            "composition of batches",
        ),
        # near zero: MAP falls, MAP stays
        (
            lambda s: 4.5 * math.exp(-8 * s),
            lambda s: 0.5 * min(1, 5 * s) - 0.2 * s,
            "near zero.*MAP has fallen from 0.46",
        ),
        (
            lambda s: 4.5 * math.exp(-8 * s),
            lambda s: 0.5 * min(1, 5 * s),
            "near zero.*hardly grown since epoch 20",
        ),
        # not near zero, but all that it learns is of no use to others
        (lambda s: 4.5 - 3.5 * s, lambda s: 0.5 * min(1, 5 * s), "while the loss fell on from .*by heart"),
        (lambda s: 4.5 - 0.01 * s, lambda s: 0.1 + 0.001 * s, "loss has not fallen"),
        (falling, lambda s: 0.013 + 0.001 * s, "about that of a random order"),
        (falling, lambda s: 0.1 + 0.4 * s, "still growing: train longer"),
    ],
)
def test_what_curves_say(tmp_path: Path, loss: Curve, ap: Curve, said: str) -> None:
    sentences = [
        s for s in found(tmp_path, curves(100, loss, ap)) if "still growing" not in s or "growing" in said
    ]
    assert len(sentences) == 1, sentences
    assert re.search(said, sentences[0]), sentences


def test_remedies_name_the_recipes_values(tmp_path: Path) -> None:
    flat = curves(100, lambda s: 2 + 2.5 * math.exp(-40 * s), lambda s: 0.3 * (1 - math.exp(-30 * s)))
    (many,) = found(tmp_path / "many", flat, facts={"data": {"cliques_per_batch": 32}})
    assert "data.cliques_per_batch above 32; hard negatives by `mining`" in many
    few = {**COUNTS, "train": {"tracks": 60, "cliques": 30, "dropped": 0}}
    (all_in_one,) = found(tmp_path / "few", flat, counts=few)
    assert "a batch already holds all 30 cliques: more works" in all_in_one
    facts = {"loss": {"kind": "triplet"}, "mining": {}}
    (triplet,) = found(tmp_path / "triplet", flat, facts=facts)
    assert "loss.choice: hardest" in triplet
    assert "temperature" not in triplet
    assert "mining" not in triplet
    learned = curves(100, lambda s: 4.5 * math.exp(-8 * s), lambda s: 0.5 * min(1, 5 * s) - 0.1 * s)
    facts = {"model": {"kind": "avg_mlp", "dropout": 0.25}, "loss": {"kind": "nt_xent", "temperature": 0.07}}
    (by_heart,) = found(tmp_path / "heart", learned, facts=facts)
    assert "model.dropout, now 0.25" in by_heart
    assert "a higher loss.temperature, now 0.07" in by_heart
    assert "its 1,000 training cliques by heart" in by_heart


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"gradient_norm": lambda s: 0.3 * math.exp(4 * s)}, "has grown from .* lower learning rate"),
        ({"gradient_norm": 7.0}, "above optimiser.clip (1) in 100%"),
        ({"padded_share": 0.4}, "40% of the positions"),
    ],
)
def test_what_the_optimiser_and_the_batches_say(tmp_path: Path, more: dict, said: str) -> None:
    (sentence,) = found(tmp_path, healthy(**more))
    for part in said.split(" .* "):
        assert part in sentence


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"waited_share": 0.06},
            "6% of the time goes into waiting for data: raise resources.loaders (now 1)",
        ),
        (
            {"counts": {**COUNTS, "train": {"tracks": 90, "cliques": 40, "dropped": 10}}},
            "10 of 100 tracks of the train",
        ),
        (
            {"counts": {**COUNTS, "validation": {"tracks": 40, "cliques": 10, "dropped": 0}}},
            "only 10 cliques",
        ),
    ],
)
def test_what_the_record_says(tmp_path: Path, record: dict, said: str) -> None:
    (sentence,) = found(tmp_path, healthy(), **record)
    assert said in sentence


def test_what_is_as_it_should_be(tmp_path: Path) -> None:
    assert found(tmp_path / "done", healthy()) == []
    assert found(tmp_path / "short", healthy(), waited_share=0.6, wall_s=20.0) == []
    # a warm-up does not learn yet, and nobody should be told that it never will
    slow = curves(40, lambda s: 4.5 - 0.01 * s, lambda s: 0.012 + 0 * s)
    facts = {"optimiser": {"epochs": 1000, "warmup_epochs": 50}}
    assert found(tmp_path / "warm", slow, outcome="running", is_held=True, facts=facts) == []


def test_a_training_within_its_warm_up(tmp_path: Path) -> None:
    facts = {"optimiser": {"epochs": 1000, "warmup_epochs": 50}}
    entries = curves(40, lambda s: 4.5 - 0.5 * s, lambda s: 0.3 - 0.1 * s)
    (sentence,) = found(tmp_path, entries, facts=facts)
    assert "Training ended after 40 epochs, within the warm-up of 50" in sentence
    (once,) = found(tmp_path / "once", healthy(9, every=9))
    assert "measured once, after epoch 9" in once
