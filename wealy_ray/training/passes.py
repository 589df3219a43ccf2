"""A batch as passes: rows of like length that go through the network together.

Which rows stand in a pass depends on the batch alone, and so do its shape and its random numbers (dropout): whichever
rank does it gets the same embeddings, bit for bit. Ranks share passes, not rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Who does what of one batch.

    Attributes:
        passes: Rows of the batch, int64, of every pass.
        ranks: Passes of each rank, by their numbers.
        padded_share: Share of the computed positions that are padding.
    """

    passes: Sequence[np.ndarray]
    ranks: Sequence[Sequence[int]]
    padded_share: float

    def rows_of(self, rank: int) -> np.ndarray:
        """Rows of the batch that a rank embeds, in the order in which it does."""
        mine = [self.passes[number] for number in self.ranks[rank]]
        return np.concatenate(mine) if mine else np.zeros(0, np.int64)

    @property
    def sizes(self) -> list[int]:
        """Rows of each rank."""
        return [len(self.rows_of(rank)) for rank in range(len(self.ranks))]

    @property
    def gathered(self) -> np.ndarray:
        """Rows of the batch in the order in which ranks' embeddings stand one after the other."""
        return np.concatenate([self.rows_of(rank) for rank in range(len(self.ranks))])


def plan_passes(lengths: np.ndarray, num_passes: int, world_size: int) -> Plan:
    """Cuts a batch and deals it out.

    Args:
        lengths: int64 [B], states of each row.
        num_passes: At most so many passes.
        world_size: Ranks; with fewer passes than that some are left without work.
    """
    order = np.argsort(-lengths, kind="stable")
    passes = _cut(order, lengths, _least_limit(lengths[order], num_passes))
    costs = [len(rows) * int(lengths[rows].max()) for rows in passes]
    loads = [0] * world_size
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    for number in sorted(range(len(passes)), key=lambda n: (-costs[n], n)):
        rank = min(range(world_size), key=lambda r: (loads[r], r))
        loads[rank] += costs[number]
        ranks[rank].append(number)
    padded = 1 - float(lengths.sum()) / sum(costs)
    return Plan(passes, [sorted(mine) for mine in ranks], padded)


def _least_limit(descending: np.ndarray, num_passes: int) -> int:
    """The smallest number of positions per pass, padding included, with which `num_passes` passes suffice."""
    low, high = int(descending[0]), int(descending[0]) * len(descending)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(np.arange(len(descending)), descending, middle)) <= num_passes:
            high = middle
        else:
            low = middle + 1
    return low


def _cut(order: np.ndarray, lengths: np.ndarray, limit: int) -> list[np.ndarray]:
    """Passes of rows from the longest on, each within `limit` positions."""
    passes, start = [], 0
    while start < len(order):
        num_rows = max(1, limit // max(1, int(lengths[order[start]])))
        passes.append(order[start : start + num_rows])
        start += num_rows
    return passes
