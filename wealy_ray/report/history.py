"""What a training was like, epoch by epoch: `history.json` as numbers that can be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NEARLY_BEST = 0.98
"""Share of the best MAP from which on a network counts as settled: what comes after is noise and polish."""
SMOOTHED_SHARE = 0.05
"""Share of the epochs that a smoothed loss is a mean of."""


@dataclass(frozen=True, eq=False)
class History:
    """Epochs that are done.

    Attributes:
        epochs: int64 [n], from 1.
        loss: float64 [n], mean over an epoch's batches, as are the next two.
        gradient_norm: float64 [n], before clipping.
        padded_share: float64 [n], positions that are padding.
        learning_rate: float64 [n], at an epoch's start.
        measured: int64 [m], epochs after which validation MAP was measured.
        maps: float64 [m].
    """

    epochs: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    padded_share: np.ndarray
    learning_rate: np.ndarray
    measured: np.ndarray
    maps: np.ndarray

    @classmethod
    def of(cls, entries: Sequence[Mapping[str, float]]) -> History:
        """From one entry per epoch; only some have a `map`."""
        measured = [e for e in entries if "map" in e]

        def column(name: str) -> np.ndarray:
            return np.array([e[name] for e in entries], np.float64)

        return cls(
            column("epoch").astype(np.int64),
            column("loss"),
            column("gradient_norm"),
            column("padded_share"),
            column("learning_rate"),
            np.array([e["epoch"] for e in measured], np.int64),
            np.array([e["map"] for e in measured], np.float64),
        )

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def best(self) -> int:
        """Number of the best measurement, the first of equals; there must be one."""
        return int(np.argmax(self.maps))

    @property
    def settled(self) -> int:
        """Number of the first measurement that nearly reaches the best one."""
        return int(np.argmax(self.maps >= NEARLY_BEST * self.maps[self.best]))

    @property
    def without_gain(self) -> int:
        """Measurements since the best one."""
        return len(self.maps) - 1 - self.best

    @property
    def smoothed_loss(self) -> np.ndarray:
        """float64 [n]: mean of the loss over this epoch and a few around it."""
        half = max(1, round(SMOOTHED_SHARE * len(self))) // 2
        sums = np.cumsum(np.concatenate([[0.0], self.loss]))
        epochs = np.arange(len(self))
        starts, ends = np.maximum(epochs - half, 0), np.minimum(epochs + half + 1, len(self))
        return (sums[ends] - sums[starts]) / (ends - starts)

    def loss_at(self, epoch: int) -> float:
        """Smoothed loss of an epoch."""
        return float(self.smoothed_loss[int(np.searchsorted(self.epochs, epoch))])
