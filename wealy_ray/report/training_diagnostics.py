"""Sentences about what looks wrong in a training, each with its likely cause and what to try."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from wealy_ray.report.learning_diagnostics import MIN_EPOCHS, about_learning
from wealy_ray.report.training_run import Training

ALWAYS = 0.9
"""Share of the epochs that counts as all of them."""
AP_SPREAD = 0.35
"""Standard deviation of a clique's mean AP when MAP is about a half; less near 0 and 1."""
MAX_MAP_ERROR = 0.1
MAX_PADDED_SHARE = 0.25
MAX_WAITED_SHARE = 0.05
MIN_TIMED_S = 60.0
"""A shorter run mostly waits for its reading processes to start."""
MAX_DROPPED_SHARE = 0.05
MAX_NORM_GROWTH = 3.0
"""Median norm of the gradients in the last fifth of the epochs, over that of the first fifth after the warm-up."""


def diagnose_training(training: Training) -> list[str]:
    """What looks wrong, most basic first; empty when nothing does."""
    return [
        *_about_outcome(training),
        *_about_data(training),
        *about_learning(training),
        *_about_optimiser(training),
        *_about_speed(training),
    ]


def _about_outcome(training: Training) -> Iterator[str]:
    """A run that failed; one without an epoch; MAP that was measured only once."""
    outcome, history = training.outcome, training.history
    if outcome == "left":
        yield (
            "The training is not done, and nobody seems to be at work on it: its driver or its machine was stopped. "
            "The same `wealy train` goes on from the last checkpoint."
        )
    elif outcome == "KeyboardInterrupt":
        yield "The training was interrupted: the same `wealy train` goes on from the last checkpoint."
    elif outcome not in ("running", "done"):
        why = training.record.get("error") or "it left no message; look at the job's log"
        yield f"The last run ended as {outcome}: {why.rstrip('.')}."
    if not len(history):
        yield "No epoch is finished: there are no curves to look at."
    elif len(history.maps) == 1 and outcome == "done":
        yield (
            f"Validation MAP was measured once, after epoch {history.measured[0]}: neither a best epoch nor a "
            f"plateau can be seen; lower validation.every_epochs ({training.facts['validation']['every_epochs']})."
        )


def _about_data(training: Training) -> Iterator[str]:
    """Tracks that are left out (above 5 %), and a validation split whose interval is wider than +- 0.1."""
    for split in ("train", "validation"):
        found = training.counts(split)
        tracks, dropped = found.get("tracks", 0), found.get("dropped", 0)
        if dropped > MAX_DROPPED_SHARE * (tracks + dropped):
            yield (
                f"{dropped:,} of {tracks + dropped:,} tracks of the {split} split have no states that count, and are "
                "left out: extract them, or look at data.kinds."
            )
    cliques = training.counts("validation").get("cliques", 0)
    if cliques and (error := 1.96 * AP_SPREAD / math.sqrt(cliques)) > MAX_MAP_ERROR:
        yield (
            f"Validation has only {cliques} cliques: their MAP is known to about +- {error:.2f} (95 % interval), so "
            "the best epoch is partly luck, and a small gain means nothing; hold out more works."
        )


def _about_optimiser(training: Training) -> Iterator[str]:
    """After the warm-up: gradients that grow, or are above the clip in 90 % of the epochs; or nothing after it."""
    recipe, history = training.facts, training.history
    clip, warmup = recipe["optimiser"]["clip"], recipe["optimiser"]["warmup_epochs"]
    norms = history.gradient_norm[history.epochs > warmup]
    if len(norms) >= MIN_EPOCHS:
        fifth = len(norms) // 5
        early, late = np.median(norms[:fifth]), np.median(norms[-fifth:])
        share = float(np.mean(norms > clip))
        rate = f"optimiser.learning_rate, now {recipe['optimiser']['learning_rate']:g}"
        standardise = "" if recipe["model"]["standardise"] else ", or model.standardise: true"
        if late > MAX_NORM_GROWTH * early and late > clip:
            yield (
                f"The gradients' norm has grown from {early:.3g} to {late:.3g} since the warm-up: steps become "
                f"unstable; try a lower learning rate ({rate}){standardise}."
            )
        elif share >= ALWAYS:
            yield (
                f"The gradients' norm is above optimiser.clip ({clip:g}) in {share:.0%} of the epochs (median "
                f"{np.median(norms):.3g}): every step is cut to one length, so batches that matter count no more "
                f"than others; raise the clip{standardise}."
            )
    if training.outcome == "done" and 0 < len(history) <= warmup:
        yield (
            f"Training ended after {_epochs(len(history))}, within the warm-up of {warmup}: the learning rate was "
            "never reached; lower optimiser.warmup_epochs, or raise validation.patience."
        )


def _about_speed(training: Training) -> Iterator[str]:
    """More than a quarter of the positions is padding; more than a twentieth of the time goes into waiting."""
    recipe, history, record = training.facts, training.history, training.record
    if len(history) and (padded := float(history.padded_share.mean())) > MAX_PADDED_SHARE:
        yield (
            f"{padded:.0%} of the positions that go through the network are padding: raise resources.passes (now "
            f"{recipe['passes']}), so that tracks of like length stand together, or lower data.crop (now "
            f"{recipe['data']['crop']:,})."
        )
    waited, wall_s = record.get("waited_share") or 0.0, record.get("wall_s") or 0.0
    if waited > MAX_WAITED_SHARE and wall_s >= MIN_TIMED_S:
        yield (
            f"{waited:.0%} of the time goes into waiting for data: raise resources.loaders (now "
            f"{record['recipe']['resources']['loaders']}); if the store is remote, keep its shards on local disk "
            "(resources.cache_gib)."
        )


def _epochs(num: int) -> str:
    return "1 epoch" if num == 1 else f"{num:,} epochs"
