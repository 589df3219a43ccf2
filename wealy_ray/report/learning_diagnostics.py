"""Sentences about what a training learns: what its loss and its validation MAP say together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from wealy_ray.report.history import NEARLY_BEST, History
from wealy_ray.report.training_run import Training

MIN_EPOCHS = 10
"""A shorter training's curves say nothing."""
FALL_WHILE_SETTLED = 0.25
"""Share of the loss that goes after MAP has settled, from which on it goes into learning by heart."""
NEAR_ZERO = 0.05
"""Share of the first loss below which nothing is left to learn from."""
MOST_OF_FALL = 0.95
EARLY = 0.25
"""Share of the epochs in which a loss that plateaus early has done most of its fall."""
NO_FALL = 0.05
"""Share of the first loss that a loss must fall by to have fallen at all."""
LATE = 0.75
"""Share of the epochs after which MAP is still growing if it settles there."""
MIN_SKILL = 0.1
"""Share of the way from chance to MAP 1 below which a MAP that is less than twice chance is no better than chance."""
MIN_SINCE = 3
"""Measurements without growth that make a plateau."""


def about_learning(training: Training) -> Iterator[str]:
    """What loss and MAP say together."""
    history, optimiser = training.history, training.facts["optimiser"]
    # before the learning rate is reached nothing can be said of a training that goes on
    enough = MIN_EPOCHS if training.outcome == "done" else MIN_EPOCHS + optimiser["warmup_epochs"]
    if len(history) >= enough and (said := _about_chance(training) or _about_loss(training)):
        yield said
    if len(history.maps) < 2 or training.outcome != "done":
        return
    epochs, last = len(history), history.measured[-1]
    if not history.without_gain and history.measured[history.settled] > LATE * epochs:
        yield (
            f"The best epoch is the last one ({last}), and MAP was still growing: train longer (optimiser.epochs, now "
            f"{optimiser['epochs']:,})."
        )


def _about_chance(training: Training) -> str | None:
    """A loss that falls while validation MAP stays that of a random order."""
    history, chance = training.history, training.chance
    if not len(history.maps) or chance is None or not _has_fallen(history):
        return None
    best = history.maps[history.best]
    if best >= 2 * chance or best - chance >= MIN_SKILL * (1 - chance):
        return None
    return (
        f"The loss falls, but validation MAP ({best:.3f} at best) is about that of a random order ({chance:.3f}): what "
        "is learned holds for the training cliques alone. Check that both splits' cliques and states belong to "
        "their tracks (an evaluation's row for the mean of the states says so too); then train on more works."
    )


def _has_fallen(history: History) -> bool:
    loss = history.smoothed_loss
    return bool(loss[0] - loss.min() >= NO_FALL * abs(loss[0]))


def _about_loss(training: Training) -> str | None:
    """At most one of four.

    - The loss has fallen by less than 5 %: nothing is learned.
    - It is below 5 % of the first, and MAP has settled: batches are solved, training cliques known by heart.
    - It fell by another quarter after MAP had settled: training cliques are learned by heart.
    - It did 95 % of its fall in the first quarter of the epochs, and MAP had settled in the first half: batches are
      composed so that nothing is left to learn from them.

    MAP has settled at the first measurement that reaches 98 % of the best, if at least three follow.
    """
    recipe, history = training.facts, training.history
    loss, cliques = history.smoothed_loss, training.counts("train").get("cliques", 0)
    first, last = loss[0], loss[-1]
    if not _has_fallen(history):
        return (
            f"The loss has not fallen ({first:.3g} at first, {last:.3g} now): nothing is learned. Try another "
            f"optimiser.learning_rate (now {recipe['optimiser']['learning_rate']:g}) and model.standardise, and "
            "check that the manifest's cliques belong to its tracks."
        )
    settles = len(history.maps) and len(history.maps) - 1 - history.settled >= MIN_SINCE
    settled = int(history.measured[history.settled]) if settles else 0
    reached = f"{history.maps[history.settled]:.3f} then, {history.maps.max():.3f} at best" if settles else ""
    grown = f"MAP has hardly grown since epoch {settled} ({reached})"
    if settles and history.maps[-1] < NEARLY_BEST * history.maps.max():
        best = history.best
        grown = (
            f"MAP has fallen from {history.maps[best]:.3f} in epoch {history.measured[best]} to "
            f"{history.maps[-1]:.3f}"
        )
    by_heart = f"the network knows its {cliques:,} training cliques by heart" if cliques else "it memorises"
    if settles and 0 <= last < NEAR_ZERO * first:
        return (
            f"The loss is near zero ({last:.2g}, it began at {first:.3g}) while {grown}: every batch is solved, and "
            f"{by_heart}. More works help most; then regularisation ({_regularisation(recipe)}), and harder batches "
            f"({_harder_batches(recipe, cliques, loosen=False)})."
        )
    before = history.loss_at(settled) if settles else last
    if before - last > FALL_WHILE_SETTLED * abs(before):
        return (
            f"{grown}, while the loss fell on from {before:.3g} to {last:.3g}: {by_heart}. More works help most; then "
            f"regularisation ({_regularisation(recipe)})."
        )
    fall = first - loss.min()
    flat = int(history.epochs[np.argmax(loss <= first - MOST_OF_FALL * fall)])
    map_is_flat = not len(history.maps) or (settles and settled <= len(history) / 2)
    if flat <= EARLY * len(history) and map_is_flat:
        stays = f", and {grown}" if settles else ""
        return (
            f"The loss has hardly fallen since epoch {flat} of {len(history)} ({history.loss_at(flat):.3g} then, "
            f"{last:.3g} now){stays}: look at the composition of batches first ("
            f"{_harder_batches(recipe, cliques, loosen=True)}), then at the learning rate."
        )
    return None


def _regularisation(recipe: Mapping[str, Any]) -> str:
    """What holds a network back from learning by heart, with the recipe's values."""
    said = [
        f"model.dropout, now {recipe['model']['dropout']:g}",
        f"optimiser.weight_decay, now {recipe['optimiser']['weight_decay']:g}",
    ]
    if temperature := recipe["loss"].get("temperature"):
        said.append(f"a higher loss.temperature, now {temperature:g}")
    return "; ".join([*said, "a smaller network"])


def _harder_batches(recipe: Mapping[str, Any], cliques: int, *, loosen: bool) -> str:
    """What makes batches teach more; `loosen` names the temperature too."""
    said, per_batch = [], recipe["data"]["cliques_per_batch"]
    if cliques > per_batch or not cliques:
        said.append(f"data.cliques_per_batch above {per_batch}")
        if recipe["mining"] is None:
            said.append("hard negatives by `mining`")
    else:
        said.append(f"a batch already holds all {cliques:,} cliques: more works")
    if recipe["loss"].get("choice") == "first":
        said.append("loss.choice: hardest")
    if loosen and (temperature := recipe["loss"].get("temperature")):
        said.append(f"a lower loss.temperature, now {temperature:g}")
    return "; ".join(said)
