"""Crops of tracks: read by the index, only the bytes between their first and last state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from wealy_ray.store import Index, Payloads, StoreReader, TrackCache
from wealy_ray.store.index import one_chunk
from wealy_ray.whisper.types import Kind


class CropReader:
    """Reads what training sees of a track; tracks are named by their rows of the index.

    It holds columns of numbers, not the index, so that loader processes may have copies.

    Args:
        reader: The store.
        length: States of a crop; shorter tracks are taken whole.
        kinds: Kinds of states that count (`Kind`), in the order of the track; None: all.
        cache: For tracks of a remote store.
    """

    def __init__(
        self,
        reader: StoreReader,
        length: int,
        kinds: frozenset[int] | None = None,
        cache: TrackCache | None = None,
    ) -> None:
        self.length = length
        self.payloads = Payloads.of(reader.storage, reader.root, reader.index, cache)
        self._kinds = None if kinds is None else _Kinds.of(reader.index, kinds)

    @property
    def dim(self) -> int:
        """Width of a state."""
        return self.payloads.dim

    def rows(self, track_ids: Sequence[str]) -> np.ndarray:
        """Rows of the index, int64, -1 for a track that is not there."""
        places = pa.compute.index_in(pa.array(track_ids, pa.string()), value_set=self.payloads.track_ids)
        return places.fill_null(-1).to_numpy().astype(np.int64)

    def num_states(self, rows: np.ndarray) -> np.ndarray:
        """States of each track that count, int64; 0 for a track that failed or is not there."""
        counts = self.payloads.num_states if self._kinds is None else self._kinds.num_states
        return np.where(rows < 0, 0, counts[rows]) if len(counts) else np.zeros(len(rows), np.int64)

    def read(self, row: int, start: int, out: np.ndarray) -> None:
        """Fills `out` (float16 [n, dim], contiguous) with n of the states that count, from the given one on."""
        if self._kinds is None:
            self.payloads.read(row, start, out)
            return
        chosen = self._kinds.places(row)[start : start + len(out)]
        if len(chosen):
            between = np.empty((int(chosen[-1] - chosen[0]) + 1, self.dim), np.float16)
            self.payloads.read(row, int(chosen[0]), between)
            np.take(between, chosen - chosen[0], axis=0, out=out, mode="clip")  # other modes make a copy

    def at(self, row: int, start: int) -> np.ndarray:
        """The crop that begins with the given state of those that count, float16 [n, dim]."""
        left = int(self.num_states(np.array([row]))[0]) - start
        out = np.empty((max(0, min(self.length, left)), self.dim), np.float16)
        self.read(row, start, out)
        return out


@dataclass(frozen=True, eq=False)
class _Kinds:
    """Runs of kinds of all tracks, one after the other.

    Attributes:
        chosen: Kinds that count.
        ends: int64 [num_rows + 1], where each track's runs begin; those of the next end them.
        kinds: int8 [num_runs].
        lengths: [num_runs], in the smallest type that holds them: there are a hundred runs in a track.
        num_states: int64 [num_rows], states that count.
    """

    chosen: np.ndarray
    ends: np.ndarray
    kinds: np.ndarray
    lengths: np.ndarray
    num_states: np.ndarray

    @classmethod
    def of(cls, index: Index, numbers: frozenset[int]) -> _Kinds:
        lists = one_chunk(index.table["kind_runs"])
        chosen = np.array(sorted(numbers))
        sizes = pa.compute.list_value_length(lists).fill_null(0).to_numpy() // 2
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        runs = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)
        kinds, lengths = runs[:, 0].astype(np.int8), runs[:, 1]
        counted = np.concatenate([[0], np.cumsum(lengths * np.isin(kinds, chosen), dtype=np.int64)])
        lengths = lengths.astype(np.min_scalar_type(lengths.max(initial=0)))
        return cls(chosen, ends, kinds, lengths, counted[ends[1:]] - counted[ends[:-1]])

    def places(self, row: int) -> np.ndarray:
        """Which of a track's states count, ascending."""
        mine = slice(self.ends[row], self.ends[row + 1])
        return np.flatnonzero(np.repeat(np.isin(self.kinds[mine], self.chosen), self.lengths[mine]))


def kinds_by_name(names: Sequence[str] | None) -> frozenset[int] | None:
    """Numbers of kinds: `prompt`, `sot`, `text`, `timestamp`, `eot`."""
    return None if names is None else frozenset(int(Kind[name.upper()]) for name in names)
