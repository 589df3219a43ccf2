"""A distance matrix that was computed elsewhere."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wealy_ray.errors import StoreError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.scores import CPU, hide_missing, named
from wealy_ray.storage import Storage, scheme_of

MATRIX_ROWS = 256
"""Rows that are checked at a time."""


def read_matrix(storage: Storage, uri: str, ids_uri: str) -> tuple[list[str], np.ndarray]:
    """A distance matrix (`.npy`; memory-mapped where it is local) and the ids of its rows and columns.

    Args:
        storage: Access.
        uri: The matrix.
        ids_uri: Text file, one id per line, in the order of the rows.

    Raises:
        StoreError: The matrix is no square of numbers, or its ids are not as many, or one stands twice.
    """
    try:
        if scheme_of(uri) == "file":
            storage.info(uri)  # a missing file is the storage's to report
            matrix = np.load(storage.canonical(uri), mmap_mode="r", allow_pickle=False)
        else:
            matrix = np.load(io.BytesIO(storage.read(uri)), allow_pickle=False)
        ids = [line.strip() for line in storage.read(ids_uri).decode().splitlines() if line.strip()]
    except (ValueError, EOFError) as e:
        raise StoreError(
            f"{uri} is no .npy matrix of numbers, or {ids_uri} no text file with one id per line"
        ) from e
    if not isinstance(matrix, np.ndarray):
        raise StoreError(f"{uri} is an archive of several arrays (.npz); name one array (.npy)")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype.kind != "f":
        raise StoreError(
            f"{uri} is {matrix.dtype} {list(matrix.shape)}; it must be a square of floating-point numbers"
        )
    if len(ids) != len(matrix):
        raise StoreError(f"{ids_uri} has {len(ids)} ids for a matrix of {len(matrix)} rows")
    doubled = [track_id for track_id, number in Counter(ids).items() if number > 1]
    if doubled:
        raise StoreError(f"id '{doubled[0]}' stands twice in {ids_uri}")
    return ids, matrix


@dataclass(eq=False)
class MatrixScores:
    """Negated distances of a given matrix; +inf in it means no score.

    Attributes:
        matrix: [N, N] distances, rows of queries.
        places: int64 [num_tracks], row and column of each track, -1 where it has none.
        candidates: int64 [num_candidates], `Collection.candidates`.
    """

    matrix: np.ndarray
    places: np.ndarray
    candidates: np.ndarray

    def __post_init__(self) -> None:
        self.missing = self.places < 0

    @classmethod
    def of(cls, collection: Collection, ids: Sequence[str], matrix: np.ndarray) -> MatrixScores:
        """Looks tracks up by id; the collection's others are missing, the matrix's others left out.

        Raises:
            StoreError: NaN, -inf, or a number that float32 cannot hold.
        """
        bad: list[str] = []
        for first in range(0, len(matrix), MATRIX_ROWS):
            block = matrix[first : first + MATRIX_ROWS]
            with np.errstate(over="ignore"):
                narrow = block.astype(np.float32)  # as scores are; what does not fit would become "no score"
            rows = (~np.isfinite(narrow) & ~np.isposinf(block)).any(axis=1)
            bad += [ids[first + i] for i in np.flatnonzero(rows).tolist()]
        if bad:
            raise StoreError(
                f"the distance matrix holds NaN, -inf or numbers beyond float32 in {len(bad)} rows: {named(bad)}; "
                "compute it again"
            )
        place = {track_id: i for i, track_id in enumerate(ids)}
        places = np.array([place.get(track_id, -1) for track_id in collection.track_ids], np.int64)
        return cls(matrix, places, collection.candidates)

    def __getstate__(self) -> dict[str, object]:
        # pickled, a memory-mapped matrix would become a copy in memory: its file's name is enough
        mapped = self.matrix if isinstance(self.matrix, np.memmap) else None
        return {**self.__dict__, "matrix": self.matrix if mapped is None else str(mapped.filename)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if isinstance(state["matrix"], str):
            self.matrix = np.load(state["matrix"], mmap_mode="r", allow_pickle=False)

    def rows(self, queries: np.ndarray, device: torch.device = CPU) -> Tensor:
        """See `Scores`."""
        columns = self.places[self.candidates]
        out = np.full((len(queries), len(columns)), -np.inf, np.float32)
        for i, query in enumerate(queries):
            if not self.missing[query]:
                out[i] = -self.matrix[self.places[query]][columns]
        scores = torch.from_numpy(out).to(device)
        hide_missing(scores, self.missing, queries, self.candidates)
        return scores
