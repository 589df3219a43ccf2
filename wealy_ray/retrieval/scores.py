"""Scores of queries with all candidates: what every system, baseline and fusion gives to the ranking.

Higher is nearer. A candidate or query that a system knows nothing of has -inf. Shapes of tiles are fixed and last
tiles are padded, so that a score has the same bits whatever is computed next to it and by how many workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wealy_ray.errors import StoreError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.whisper.linear import can_pack, multiply_transposed

QUERY_TILE = 256
"""Queries that are scored at a time."""
CANDIDATE_TILE = 2048
"""Candidates that a CPU multiplies at a time: their products with a tile of queries (2 MiB) stay in the cache. A GPU
multiplies all of them at once."""
CPU = torch.device("cpu")


class Scores(Protocol):
    """One system's similarities over one collection.

    Attributes:
        missing: bool [num_tracks], tracks that the system knows nothing of.
    """

    missing: np.ndarray

    def rows(self, queries: np.ndarray, device: torch.device = CPU) -> Tensor:
        """Scores float32 [len(queries), num_candidates] of tracks (by their number) with all candidates."""
        ...


def check_vectors(track_ids: np.ndarray, vectors: np.ndarray, missing: np.ndarray) -> None:
    """Refuses NaN and infinity.

    Raises:
        StoreError: With the ids of the first tracks.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim))) & ~missing)
    if len(bad):
        raise StoreError(
            f"the vectors of {len(bad)} tracks hold NaN or infinity: {named([track_ids[i] for i in bad])}; "
            "compute them again, or leave these tracks out"
        )


def named(names: Sequence[str]) -> str:
    """The first few names, for a sentence."""
    return ", ".join(f"'{name}'" for name in names[:5]) + (" ..." if len(names) > 5 else "")


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, float32; a zero vector stays zero: its cosine with everything is 0."""
    rows = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    return np.ascontiguousarray((rows / np.where(norms == 0, 1, norms)).astype(np.float32))


@dataclass(eq=False)
class VectorScores:
    """Inner products of one vector per track; of unit rows, their cosine.

    Arrays are never copied in a worker: what Ray shares among the processes of a node stays shared.

    Attributes:
        padded: float32 [num_tiles * CANDIDATE_TILE, d], candidates in the order of the columns, then zeros.
        tracks: float32 [num_tracks, d] where not every track is a candidate; None: the candidates are the tracks.
        missing: bool [num_tracks].
        candidates: int64 [num_candidates], `Collection.candidates`.
    """

    padded: np.ndarray
    tracks: np.ndarray | None
    missing: np.ndarray
    candidates: np.ndarray
    _on_device: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def cosine(cls, collection: Collection, vectors: np.ndarray, missing: np.ndarray) -> VectorScores:
        """Cosine similarity.

        Args:
            collection: The tracks.
            vectors: float32 [num_tracks, d], in the collection's order.
            missing: bool [num_tracks], tracks that have none.

        Raises:
            StoreError: A vector holds NaN or infinity.
        """
        check_vectors(collection.track_ids, vectors, missing)
        if not vectors.shape[1]:  # nobody has a vector; a product needs a dimension
            vectors = np.zeros((len(vectors), 1), np.float32)
        unit = unit_rows(np.where(missing[:, None], 0, vectors))
        candidates = collection.candidates
        num_tiles = -(-len(candidates) // CANDIDATE_TILE)
        padded = np.zeros((num_tiles * CANDIDATE_TILE, unit.shape[1]), np.float32)
        padded[: len(candidates)] = unit[candidates]
        return cls(padded, None if len(candidates) == len(unit) else unit, missing, candidates)

    @property
    def vectors(self) -> np.ndarray:
        """float32 [num_tracks, d], in the collection's order."""
        return self.padded[: len(self.missing)] if self.tracks is None else self.tracks

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_on_device": {}}

    def rows(self, queries: np.ndarray, device: torch.device = CPU) -> Tensor:
        """See `Scores`."""
        block = np.zeros((-(-len(queries) // QUERY_TILE) * QUERY_TILE, self.padded.shape[1]), np.float32)
        block[: len(queries)] = self.vectors[queries]
        query_tiles = torch.from_numpy(block).to(device).split(QUERY_TILE)
        candidates = self._candidates(device)
        num_columns = len(self.candidates)
        out = empty_rows(len(queries), num_columns, device)
        step = CANDIDATE_TILE if device.type == "cpu" else len(candidates)
        for c in range(0, num_columns, step):
            tile = candidates[c : c + step]
            for q, query_tile in enumerate(query_tiles):
                part = out[q * QUERY_TILE : (q + 1) * QUERY_TILE, c : c + step]
                part.copy_(products(query_tile, tile)[: part.shape[0], : part.shape[1]])
        hide_missing(out, self.missing, queries, self.candidates)
        return out

    def _candidates(self, device: torch.device) -> Tensor:
        key = str(device)
        if key not in self._on_device:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # shared memory cannot be written; nobody does
                self._on_device[key] = torch.from_numpy(self.padded).to(device)
        return self._on_device[key]


def empty_rows(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Float32 [num_rows, num_columns], not filled.

    On the CPU numpy asks for huge pages: with torch's small ones, half of a product's time goes into page faults.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.empty((num_rows, num_columns), np.float32))
    return torch.empty(num_rows, num_columns, device=device)


def products(x: Tensor, y: Tensor) -> Tensor:
    """[n, d] times the transposed [m, d] in strict float32, by the fastest library there is."""
    if x.device.type == "cpu" and can_pack(x.dtype):
        return multiply_transposed(x, y)
    assert not torch.backends.cuda.matmul.allow_tf32, "TF32 changes ranks"
    return x @ y.T


def hide_missing(scores: Tensor, missing: np.ndarray, queries: np.ndarray, candidates: np.ndarray) -> None:
    """Sets -inf, in place, where the query or the candidate is missing."""
    if missing.any():
        scores[:, torch.from_numpy(missing[candidates]).to(scores.device)] = -torch.inf
        scores[torch.from_numpy(missing[queries]).to(scores.device)] = -torch.inf
