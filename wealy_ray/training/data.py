"""Tracks of a training: joined from manifest and index, checked, and read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from wealy_ray.catalog import tracks_of_split
from wealy_ray.errors import ManifestError, WealyError
from wealy_ray.model.embedder import pad
from wealy_ray.training.crops import CropReader
from wealy_ray.training.passes import Plan, plan_passes
from wealy_ray.training.sampler import CliqueSampler

READERS = 8
"""Crops that one process reads at a time: their latencies overlap."""
CROPS = 3
"""Stream of random numbers of crops, beside those of the sampler."""
STATISTICS_TRACKS = 2000
"""Training tracks whose states say what inputs are standardised by."""


@dataclass(frozen=True, eq=False)
class Tracks:
    """Tracks of a split that have states that count.

    Attributes:
        track_ids: Ascending.
        cliques: int64, negative without a clique.
        languages: Codes of the manifest, "" where it names none.
        lengths: int64, states that count.
        num_dropped: Tracks of the split without any.
    """

    track_ids: Sequence[str]
    cliques: np.ndarray
    languages: Sequence[str]
    lengths: np.ndarray
    num_dropped: int

    def __len__(self) -> int:
        return len(self.track_ids)

    @classmethod
    def of_split(cls, manifest: pa.Table, uri: str, split: str, crops: CropReader) -> Tracks:
        """Joins a split with the store.

        Raises:
            ManifestError: The split is empty, or none of its tracks has states.
        """
        rows = tracks_of_split(manifest, uri, split).sort_by("track_id").to_pylist()
        lengths = crops.num_states([row["track_id"] for row in rows])
        kept = [(row, length) for row, length in zip(rows, lengths.tolist(), strict=True) if length]
        if not kept:
            raise ManifestError(
                f"no track of split '{split}' of {uri} has states that count: extract it first"
            )
        names = sorted({row["clique_id"] for row, _ in kept if row["clique_id"] is not None})
        number = {name: i for i, name in enumerate(names)} | {None: -1}
        return cls(
            [row["track_id"] for row, _ in kept],
            np.array([number[row["clique_id"]] for row, _ in kept], np.int64),
            [row["language"] or "" for row, _ in kept],
            np.array([length for _, length in kept], np.int64),
            len(rows) - len(kept),
        )


@dataclass(frozen=True, eq=False)
class Step:
    """One rank's part of one batch.

    Attributes:
        epoch: Number of the epoch.
        step: Number within it.
        states: float16 [B, T, dim] of each of the rank's passes, padded with zeros.
        lengths: int64 [B] of each pass.
        passes: Number of each pass within the batch.
        cliques: int64 [N], of the rows that are compared, in the order of the batch.
        tracks: Their ids.
        order: int64 [N], row of each embedding when those of all ranks stand one after the other.
        sizes: Embeddings of every rank.
        padded_share: Of the whole batch.
    """

    epoch: int
    step: int
    states: list[Tensor]
    lengths: list[Tensor]
    passes: list[int]
    cliques: Tensor
    tracks: list[str]
    order: Tensor
    sizes: list[int]
    padded_share: float


@dataclass(frozen=True, eq=False)
class Batches(Dataset[Step | WealyError]):
    """Steps, as one rank sees them; what one holds depends on its epoch and number alone.

    An error travels as a value: a loader process would make a page of text of what it raises.

    Attributes:
        tracks: The training split.
        sampler: Who stands in which batch.
        crops: Reads them.
        rank: This rank.
        world_size: Ranks.
        num_passes: See `plan_passes`.
        gathers: Whether all ranks' rows are compared; else each rank has whole cliques, and plans alone.
    """

    tracks: Tracks
    sampler: CliqueSampler
    crops: CropReader
    rank: int
    world_size: int
    num_passes: int
    gathers: bool = True

    def __getitem__(self, place: tuple[int, int]) -> Step | WealyError:
        try:
            return self._step(place)
        except WealyError as e:
            return e

    def _step(self, place: tuple[int, int]) -> Step:
        epoch, step = place
        batch = self.sampler.batch(epoch, step)
        rows = np.arange(len(batch.tracks))
        world_size, rank = self.world_size, self.rank
        if not self.gathers:
            share = batch.share(rank, world_size)
            rows, world_size, rank = rows[share], 1, 0
        lengths = np.minimum(self.tracks.lengths[batch.tracks[rows]], self.crops.length)
        plan = plan_passes(lengths, self.num_passes, world_size)
        states, row_lengths = self._read(plan, rank, batch.tracks, rows, place)
        return Step(
            epoch,
            step,
            states,
            row_lengths,
            list(plan.ranks[rank]),
            torch.from_numpy(batch.cliques[rows]),
            [self.tracks.track_ids[t] for t in batch.tracks[rows]],
            torch.from_numpy(plan.gathered),
            plan.sizes,
            plan.padded_share,
        )

    def _read(
        self, plan: Plan, rank: int, tracks: np.ndarray, rows: np.ndarray, place: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        def crop(row: int) -> np.ndarray:
            rng = np.random.default_rng([self.sampler.seed, CROPS, *place, row])
            track = tracks[row]
            return self.crops.random(self.tracks.track_ids[track], int(self.tracks.lengths[track]), rng)

        padded, lengths = [], []
        with ThreadPoolExecutor(READERS) as pool:
            for number in plan.ranks[rank]:
                found = list(pool.map(crop, rows[plan.passes[number]].tolist()))
                padded.append(pad(found))
                lengths.append(torch.tensor([len(part) for part in found]))
        return padded, lengths


class _Places(Sampler[tuple[int, int]]):
    """Epoch and step of all that is left, one epoch after the other."""

    def __init__(self, sampler: CliqueSampler, first: tuple[int, int], stop: int) -> None:
        self.sampler, self.first, self.stop = sampler, first, stop

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, step = self.first
        for number in range(epoch, self.stop):
            for place in range(step, self.sampler.steps(number)):
                yield number, place
            step = 0


def loader_of(
    batches: Batches, first: tuple[int, int], stop: int, num_workers: int, *, pins: bool
) -> DataLoader[Any]:
    """Steps from a place on, through all epochs before `stop`, read ahead by processes of their own."""
    more: dict[str, Any] = {"multiprocessing_context": "spawn", "prefetch_factor": 3} if num_workers else {}
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_Places(batches.sampler, first, stop),
        num_workers=num_workers,
        pin_memory=pins,
        **more,
    )


def input_statistics(tracks: Tracks, crops: CropReader, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension, float32 [dim], over crops of training tracks."""
    chosen = np.random.default_rng([seed, CROPS]).permutation(len(tracks))[:STATISTICS_TRACKS]
    count, total, squares = 0, np.zeros(0), np.zeros(0)
    with ThreadPoolExecutor(READERS) as pool:
        for part in pool.map(lambda t: crops.at(tracks.track_ids[t], 0), sorted(chosen.tolist())):
            values = part.astype(np.float64)
            count += len(values)
            total = values.sum(0) + (total if len(total) else 0)
            squares = (values**2).sum(0) + (squares if len(squares) else 0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()
