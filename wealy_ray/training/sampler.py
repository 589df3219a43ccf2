"""Which tracks stand in which batch.

A batch is made of slots; a slot holds versions of one clique, and no clique has two slots in one batch. Every draw is a
function of (seed, epoch, step, slot): a batch is the same whatever was drawn before, by how many ranks it is worked on,
and after any resume.

What does not fill a batch at the end of an epoch is left out; the next epoch has another order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from wealy_ray.errors import ManifestError

log = logging.getLogger(__name__)

EpochBy = Literal["cliques", "versions"]
"""Each clique once per epoch; or each version once as an anchor, with other versions of its clique."""
ORDER, VERSIONS, NEIGHBOURS = 0, 1, 2
"""What is drawn: each has its own stream of random numbers."""


@dataclass(frozen=True)
class Batch:
    """One global batch.

    Attributes:
        tracks: int64 [num_rows], the slots' tracks one after the other.
        cliques: int64 [num_rows], clique of each.
        slot_sizes: int64 [num_slots], tracks of each slot.
    """

    tracks: np.ndarray
    cliques: np.ndarray
    slot_sizes: np.ndarray

    def share(self, rank: int, world_size: int) -> slice:
        """Rows of one rank: whole slots, as many for each rank as can be, in order."""
        bounds = np.linspace(0, len(self.slot_sizes), world_size + 1).astype(int)
        ends = np.concatenate([[0], np.cumsum(self.slot_sizes)])
        return slice(int(ends[bounds[rank]]), int(ends[bounds[rank + 1]]))


class CliqueSampler:
    """Draws batches.

    Args:
        cliques: Clique of each track, int64 [num_tracks], negative where it has none.
        cliques_per_batch: Slots of a global batch; fewer where there are not as many cliques.
        versions_per_clique: Tracks of a slot; fewer where the clique is smaller.
        seed: Of every draw.
        epoch_by: See `EpochBy`.

    Raises:
        ManifestError: Fewer than two cliques have two versions: there is nothing to tell apart.
    """

    def __init__(
        self,
        cliques: np.ndarray,
        *,
        cliques_per_batch: int = 64,
        versions_per_clique: int = 2,
        seed: int = 0,
        epoch_by: EpochBy = "cliques",
    ) -> None:
        order = np.argsort(cliques, kind="stable")
        order = order[cliques[order] >= 0]
        _, starts = np.unique(cliques[order], return_index=True)
        members = [m for m in np.split(order, starts[1:]) if len(m) > 1]
        if len(members) < 2:
            raise ManifestError(
                f"training needs at least two cliques with two versions each that have states; there are {len(members)}"
            )
        if len(members) < cliques_per_batch:
            log.warning(
                "%d cliques do not fill a batch of %d; all stand in each", len(members), cliques_per_batch
            )
        self.members: Sequence[np.ndarray] = members
        self.clique_of = np.asarray(cliques)
        self.slots = min(cliques_per_batch, len(members))
        self.versions = versions_per_clique
        self.seed, self.epoch_by = seed, epoch_by
        self.near: np.ndarray | None = None
        self._planned: tuple[int, np.ndarray] | None = None

    def set_neighbours(self, near: np.ndarray | None) -> None:
        """Cliques that are hard to tell apart: half of each batch is then taken from the neighbours of the other half.

        Args:
            near: int64 [num_cliques, K], numbers in `members`, nearest first; None: no mining.
        """
        assert near is None or len(near) == len(self.members), "neighbours of other cliques"
        self.near = near

    def steps(self, epoch: int) -> int:
        """Batches of an epoch."""
        return len(self._plan(epoch))

    def batch(self, epoch: int, step: int) -> Batch:
        """One global batch."""
        plan = self._plan(epoch)[step]
        numbers, anchors = plan[:, 0], plan[:, 1]
        if self.near is not None:
            numbers, anchors = self._with_neighbours(numbers, anchors, epoch, step)
        slots = [
            self._versions_of(self.members[number], anchor, epoch, step, slot)
            for slot, (number, anchor) in enumerate(zip(numbers.tolist(), anchors.tolist(), strict=True))
        ]
        tracks = np.concatenate(slots)
        return Batch(tracks, self.clique_of[tracks], np.array([len(s) for s in slots]))

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what])

    def _plan(self, epoch: int) -> np.ndarray:
        """The plan of an epoch; that of the last one asked for is kept."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan_epoch(epoch))
        return self._planned[1]

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        """int64 [num_steps, slots, 2]: clique and anchor (-1: any version) of each slot."""
        rng = self._rng(ORDER, epoch)
        if self.epoch_by == "cliques":
            order = rng.permutation(len(self.members))
            order = order[: len(order) // self.slots * self.slots].reshape(-1, self.slots)
            return np.stack([order, np.full_like(order, -1)], axis=2)
        numbers = np.repeat(np.arange(len(self.members)), [len(m) for m in self.members])
        anchors = np.concatenate(self.members)
        order = rng.permutation(len(anchors))
        return _without_clashes(numbers[order], anchors[order], self.slots)

    def _versions_of(self, members: np.ndarray, anchor: int, epoch: int, step: int, slot: int) -> np.ndarray:
        rng = self._rng(VERSIONS, epoch, step, slot)
        if anchor < 0:
            return rng.permutation(members)[: self.versions]
        others = rng.permutation(members[members != anchor])[: self.versions - 1]
        return np.concatenate([[anchor], others])

    def _with_neighbours(
        self, numbers: np.ndarray, anchors: np.ndarray, epoch: int, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replaces the second half of the slots by one neighbour of each clique of the first half."""
        assert self.near is not None
        half = -(-len(numbers) // 2)
        chosen = numbers[:half].tolist()
        for slot in range(len(numbers) - half):
            rng = self._rng(NEIGHBOURS, epoch, step, slot)
            near = [n for n in self.near[numbers[slot]].tolist() if n not in chosen]
            # no neighbour is left: the clique that stood there stays, unless it was taken meanwhile
            spare = [n for n in numbers[half:].tolist() if n not in chosen]
            chosen.append(int(rng.choice(near)) if near else spare[0])
        replaced = np.array(chosen)
        return replaced, np.where(replaced == numbers, anchors, -1)


def _without_clashes(numbers: np.ndarray, anchors: np.ndarray, slots: int) -> np.ndarray:
    """Fills batches in order; an anchor whose clique stands in a batch already goes to the next with room."""
    batches: list[list[tuple[int, int]]] = []
    last_of: dict[int, int] = {}
    first_open = 0
    for number, anchor in zip(numbers.tolist(), anchors.tolist(), strict=True):
        at = max(first_open, last_of.get(number, -1) + 1)
        while at < len(batches) and len(batches[at]) == slots:
            at += 1
        while len(batches) <= at:
            batches.append([])
        batches[at].append((number, anchor))
        last_of[number] = at
        while first_open < len(batches) and len(batches[first_open]) == slots:
            first_open += 1
    full = [b for b in batches if len(b) == slots]
    return np.array(full, np.int64).reshape(-1, slots, 2)
