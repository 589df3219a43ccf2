"""Who watches a loop: saves in time, keeps the curves, tells how far it is, and hears when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from wealy_ray.progress import in_words
from wealy_ray.training.job import Job
from wealy_ray.training.loop import Loop
from wealy_ray.training.tracking import Tracker


@dataclass(frozen=True)
class Pulse:
    """How far a training is.

    Attributes:
        epoch, epochs: Epochs that are done, and all.
        step, steps: Of the running epoch.
        loss: Of the last step; NaN before the first since the start.
        map, best_map, best_epoch: Last and best validation MAP (-1 before the first).
        tracks, elapsed_s: Crops that were trained on since the start, and seconds.
        waited_s: Of them, waiting for data.
        left_s: Seconds to the last epoch.
        workers: Ranks.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    map: float
    best_map: float
    best_epoch: int
    tracks: int
    elapsed_s: float
    waited_s: float
    left_s: float
    workers: int

    def line(self) -> str:
        """For a terminal or a log."""
        place = f"epoch {self.epoch + 1}/{self.epochs}, step {self.step}/{self.steps}"
        if not self.step and self.epoch:
            place = f"epoch {self.epoch}/{self.epochs} done"
        measured = (
            f"MAP {self.map:.4f} (best {self.best_map:.4f} in epoch {self.best_epoch})"
            if self.best_epoch >= 0
            else "MAP not measured yet"
        )
        elapsed_s = max(self.elapsed_s, 1e-9)
        speed = f"{self.tracks / elapsed_s:.1f} tracks/s, {self.waited_s / elapsed_s:.0%} waiting for data"
        left = f"ETA {in_words(self.left_s)}" if self.tracks else "ETA unknown"
        loss = "no loss yet" if math.isnan(self.loss) else f"loss {self.loss:.4f}"
        return f"{place}, {loss}, {measured}, {speed}, {left}"


class Ear(Protocol):
    """Whoever started a rank, as seen by it; called after each step."""

    def tell(self, pulse: Pulse) -> None:
        """How far it is."""
        ...

    def wants(self) -> tuple[bool, bool]:
        """Whether to save, and whether to save and stop."""
        ...


class Keeper:
    """The watcher of one rank (`loop.Watcher`); only the first one writes.

    Args:
        job: The training.
        ear: See `Ear`.
        trackers: Are given each epoch's numbers by the first rank.
    """

    def __init__(self, job: Job, ear: Ear, trackers: Sequence[Tracker] = ()) -> None:
        self.job, self.ear, self.trackers = job, ear, trackers
        self._began_s = self._saved_s = time.monotonic()
        self._first_step: int | None = None

    def wants(self, loop: Loop) -> tuple[bool, bool]:
        """What the ear heard; and to save when the last checkpoint is old."""
        saves, stops = self.ear.wants()
        if loop.rank.number == 0:
            self.ear.tell(self.pulse(loop))
            saves |= self._is_due()
        return saves, stops

    def save(self, loop: Loop, *, is_wanted: bool) -> None:
        """Saves at the best and the last epoch, when it is wanted, or when the last time is long ago."""
        if loop.rank.number:
            return
        progression = loop.progression
        if not progression.step:
            for tracker in self.trackers:
                tracker.log(progression.history[-1])
            self.ear.tell(self.pulse(loop))
        if is_wanted or loop.is_best or loop.is_over or self._is_due():
            self.job.save(loop)
            for tracker in self.trackers:
                tracker.flush()
            self._saved_s = time.monotonic()

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_s > self.job.recipe.checkpoint_every_s

    def pulse(self, loop: Loop) -> Pulse:
        """How far a loop is."""
        progression, epochs = loop.progression, self.job.recipe.optimiser.epochs
        steps = loop.sampler.steps(min(progression.epoch, epochs - 1))
        done = (
            progression.epoch * steps + progression.step
        )  # epochs may differ by a step: good enough for an ETA
        if self._first_step is None:
            self._first_step = done - 1
        elapsed_s = time.monotonic() - self._began_s
        left_s = (epochs * steps - done) * elapsed_s / max(1, done - self._first_step)
        measured = [entry["map"] for entry in progression.history if "map" in entry]
        return Pulse(
            progression.epoch,
            epochs,
            progression.step,
            steps,
            loop.last_loss,
            measured[-1] if measured else -1.0,
            progression.best_map,
            progression.best_epoch,
            loop.tracks_done,
            elapsed_s,
            loop.waited_s,
            left_s,
            loop.rank.world_size,
        )
