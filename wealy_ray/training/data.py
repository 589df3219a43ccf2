"""Tracks of a training: joined from manifest and index, checked, and read batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from wealy_ray.catalog import tracks_of_split
from wealy_ray.errors import ManifestError, TrainingError
from wealy_ray.store.schema import STATES_DTYPE
from wealy_ray.training.crops import CropReader
from wealy_ray.training.passes import plan_passes
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
        rows: int64, their rows of the index.
        cliques: int64, negative without a clique.
        languages: Codes of the manifest, "" where it names none.
        lengths: int64, states that count.
        num_dropped: Tracks of the split without any.
    """

    track_ids: Sequence[str]
    rows: np.ndarray
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
        tracks = tracks_of_split(manifest, uri, split).sort_by("track_id").to_pylist()
        rows = crops.rows([track["track_id"] for track in tracks])
        lengths = crops.num_states(rows)
        has_states = lengths > 0
        kept = [track for track, has in zip(tracks, has_states.tolist(), strict=True) if has]
        if not kept:
            raise ManifestError(
                f"no track of split '{split}' of {uri} has states that count: extract it first"
            )
        names = sorted({track["clique_id"] for track in kept if track["clique_id"] is not None})
        number = {name: i for i, name in enumerate(names)} | {None: -1}
        return cls(
            [track["track_id"] for track in kept],
            rows[has_states],
            np.array([number[track["clique_id"]] for track in kept], np.int64),
            [track["language"] or "" for track in kept],
            lengths[has_states],
            len(tracks) - len(kept),
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
class Batches:
    """Steps, as one rank sees them; what one holds depends on its epoch and number alone.

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

    @property
    def most_bytes(self) -> int:
        """No step's states take more, padding included."""
        longest = min(self.crops.length, int(self.tracks.lengths.max()))
        slots, versions = self.sampler.slots, self.sampler.versions
        if self.gathers:
            # no pass needs more rows than this, and the ranks' loads differ by a pass at most
            rows, pass_rows = slots * versions, -(-slots * versions // self.num_passes)
            rows = min(rows, -(-rows // self.world_size) + pass_rows) if self.world_size > 1 else rows
        else:
            rows = -(-slots // self.world_size) * versions
        return rows * longest * self.crops.dim * STATES_DTYPE.itemsize

    def read(self, place: tuple[int, int], memory: memoryview, pool: Executor) -> Step:
        """Reads a step.

        Args:
            place: Epoch and number.
            memory: Its states are put here, `most_bytes`.
            pool: Reads crops side by side.

        Raises:
            StoreError: A shard is damaged or gone.
        """
        batch = self.sampler.batch(*place)
        rows = np.arange(len(batch.tracks))
        world_size, rank = self.world_size, self.rank
        if not self.gathers:
            share = batch.share(rank, world_size)
            rows, world_size, rank = rows[share], 1, 0
        tracks = batch.tracks[rows]
        lengths = np.minimum(self.tracks.lengths[tracks], self.crops.length)
        plan = plan_passes(lengths, self.num_passes, world_size)
        # drawn for the whole batch: every rank draws the same
        draws = np.random.default_rng([self.sampler.seed, CROPS, *place]).random(len(batch.tracks))[rows]
        starts = (draws * (self.tracks.lengths[tracks] - lengths + 1)).astype(np.int64)
        passes = [plan.passes[number] for number in plan.ranks[rank]]
        shapes = [(len(mine), int(lengths[mine].max()), self.crops.dim) for mine in passes]
        states = carve(memory, shapes)
        crops = [
            (int(self.tracks.rows[tracks[row]]), int(starts[row]), int(lengths[row]), out)
            for mine, padded in zip(passes, states, strict=True)
            for row, out in zip(mine.tolist(), padded.numpy(), strict=True)
        ]
        list(pool.map(self._read_crop, crops))
        return Step(
            *place,
            states,
            [torch.from_numpy(lengths[mine]) for mine in passes],
            list(plan.ranks[rank]),
            torch.from_numpy(batch.cliques[rows]),
            [self.tracks.track_ids[t] for t in tracks],
            torch.from_numpy(plan.gathered),
            plan.sizes,
            plan.padded_share,
        )

    def _read_crop(self, crop: tuple[int, int, int, np.ndarray]) -> None:
        row, start, length, out = crop
        self.crops.read(row, start, out[:length])
        out[length:] = 0


def carve(memory: memoryview, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """float16 tensors that lie one after the other in a piece of memory."""
    tensors, first = [], 0
    for shape in shapes:
        count = math.prod(shape)
        part = torch.frombuffer(memory, dtype=torch.float16, count=count, offset=first)
        tensors.append(part.reshape(shape))
        first += count * STATES_DTYPE.itemsize
    return tensors


def name_some(track_ids: Sequence[str], most: int = 6) -> str:
    """The first few, for a sentence."""
    more = len(track_ids) - most
    return ", ".join(track_ids[:most]) + (f" and {more} more" if more > 0 else "")


def input_statistics(tracks: Tracks, crops: CropReader, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension, float32 [dim], over crops of training tracks.

    Raises:
        TrainingError: States are not finite.
    """
    chosen = np.random.default_rng([seed, CROPS]).permutation(len(tracks))[:STATISTICS_TRACKS]
    count, total, squares = 0, np.zeros(0), np.zeros(0)
    chosen.sort()
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(lambda t: crops.at(int(tracks.rows[t]), 0), chosen.tolist())
        for track, part in zip(chosen.tolist(), parts, strict=True):
            if not np.isfinite(part).all():
                raise TrainingError(
                    f"states of {tracks.track_ids[track]} are not finite: extract it again, or leave it out"
                )
            values = part.astype(np.float64)
            count += len(values)
            total = values.sum(0) + (total if len(total) else 0)
            squares = (values**2).sum(0) + (squares if len(squares) else 0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()
