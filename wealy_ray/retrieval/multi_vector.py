"""Tracks as sets of vectors (one per window or shingle), and the distance of two sets.

Every pair of vectors has a distance; a reduction makes them one:

- `min`: the nearest pair;
- `mean_min`: for each vector of the query the nearest of the candidate's, averaged (not symmetric);
- `bpwr-K`: best pairs without replacement: the nearest pair is taken and both vectors leave, up to K times (fewer
  where a set is smaller); the mean of what was taken. Of equal pairs the query's earlier vector goes first, then the
  candidate's earlier one.

Shape suffixes: S vectors of a query, T vectors of a tile of candidates, D numbers of a vector.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from wealy_ray.errors import ConfigError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.scores import CPU, hide_missing, products, unit_rows

Distance = Literal["cosine", "sqeuclidean"]
"""`1 - cos`, or the squared Euclidean distance divided by the number of dimensions."""
TILE_VECTORS = 8192
"""Vectors of candidates that are multiplied at a time."""
QUERY_VECTORS = 16
"""A query's vectors are padded to a multiple of this."""


@dataclass(frozen=True, eq=False)
class VectorTile:
    """Vectors of consecutive candidate columns.

    Attributes:
        vectors: float32 [total, d].
        offsets: int64 [num_columns + 1]; column i of the tile has `vectors[offsets[i]:offsets[i + 1]]`, maybe none.
    """

    vectors: np.ndarray
    offsets: np.ndarray


class VectorSets(Protocol):
    """The vectors of a collection's tracks, wherever they lie.

    Attributes:
        sizes: int64 [num_tracks], vectors of each track; 0: it has none.
    """

    @property
    def sizes(self) -> np.ndarray:
        """See above."""
        ...

    def of(self, track: int) -> np.ndarray:
        """Vectors float32 [S, d] of one track."""
        ...

    def tiles(self) -> Iterator[VectorTile]:
        """All candidates, in the order of the columns; one tile at a time is in use."""
        ...


@dataclass(frozen=True, eq=False)
class PackedSets:
    """Vectors in memory.

    Attributes:
        vectors: float32 [total, d], of more tracks than the collection's, maybe.
        starts: int64 [num_tracks], first vector of each track of the collection.
        sizes: int64 [num_tracks], vectors of each.
        candidates: int64 [num_candidates], `Collection.candidates`.
    """

    vectors: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    candidates: np.ndarray

    @classmethod
    def of_collection(
        cls,
        collection: Collection,
        track_ids: Sequence[str] | np.ndarray,
        vectors: np.ndarray,
        offsets: np.ndarray,
    ) -> PackedSets:
        """Looks tracks up by id; the collection's others have no vectors, further packed ones are not looked at.

        Args:
            collection: The tracks.
            track_ids: Unique ids of the packed tracks, in any order.
            vectors: float32 [total, d].
            offsets: int64 [len(track_ids) + 1]; track i has `vectors[offsets[i]:offsets[i + 1]]`.
        """
        place = {track_id: i for i, track_id in enumerate(track_ids)}
        found = np.array([place.get(track_id, -1) for track_id in collection.track_ids], np.int64)
        starts = np.where(found >= 0, offsets[:-1][found], 0) if place else np.zeros_like(found)
        sizes = np.where(found >= 0, np.diff(offsets)[found], 0) if place else np.zeros_like(found)
        return cls(vectors, starts, sizes, collection.candidates)

    def of(self, track: int) -> np.ndarray:
        """See `VectorSets`."""
        return self.vectors[self.starts[track] : self.starts[track] + self.sizes[track]]

    def tiles(self) -> Iterator[VectorTile]:
        """See `VectorSets`."""
        for first, last in cut_tiles(self.sizes[self.candidates]):
            tracks = self.candidates[first:last]
            offsets = np.cumsum([0, *self.sizes[tracks]], dtype=np.int64)
            yield VectorTile(np.concatenate([self.of(track) for track in tracks]), offsets)


def cut_tiles(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cuts tracks into tiles: whole ones, as many as `TILE_VECTORS` holds; a larger one is a tile of its own.

    Args:
        sizes: int64 [n], vectors of each track.

    Yields:
        First track of a tile, and the one after its last.
    """
    first, filled = 0, 0
    for i, size in enumerate(sizes.tolist()):
        if filled and filled + size > TILE_VECTORS:
            yield first, i
            first, filled = i, 0
        filled += size
    if len(sizes):
        yield first, len(sizes)


@dataclass(eq=False)
class MultiVectorScores:
    """Negated distances of sets of vectors.

    A row depends on nothing but its query and the candidates: each query is multiplied alone, in fixed shapes.

    Attributes:
        sets: The vectors; finite numbers.
        candidates: int64 [num_candidates], `Collection.candidates`.
        distance: See `Distance`.
        reduction: `min`, `mean_min` or `bpwr-K`.
    """

    sets: VectorSets
    candidates: np.ndarray
    distance: Distance = "cosine"
    reduction: str = "min"

    def __post_init__(self) -> None:
        if self.distance not in get_args(Distance):
            raise ConfigError(
                f"unknown distance '{self.distance}'; there are {', '.join(get_args(Distance))}"
            )
        self._max_pairs = num_pairs(self.reduction)
        self.missing = self.sets.sizes == 0

    def rows(self, queries: np.ndarray, device: torch.device = CPU) -> Tensor:
        """See `Scores`."""
        out = torch.full((len(queries), len(self.candidates)), -torch.inf)
        asking = [
            (i, *self._padded(self.sets.of(q), QUERY_VECTORS, device))
            for i, q in enumerate(queries)
            if not self.missing[q]
        ]
        first = 0
        for tile in self.sets.tiles():
            num_columns = len(tile.offsets) - 1
            y_TD, y_norms_T = self._padded(tile.vectors, TILE_VECTORS, device)
            for i, x_SD, x_norms_S in asking:
                num_vectors = int(self.sets.sizes[queries[i]])
                distances_ST = self._distances(x_SD, x_norms_S, y_TD, y_norms_T)[:num_vectors]
                out[i, first : first + num_columns] = -self._reduced(distances_ST, tile.offsets)
            first += num_columns
        assert first == len(self.candidates), (first, len(self.candidates))
        hide_missing(out, self.missing, queries, self.candidates)
        return out.to(device)

    def _padded(self, vectors: np.ndarray, multiple: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Vectors, of length one for cosine, up to a multiple of rows; and their squared norms."""
        rows = unit_rows(vectors) if self.distance == "cosine" else np.asarray(vectors, np.float32)
        # a tile of candidates without vectors is a tile too
        num = max(1, -(-len(rows) // multiple)) * multiple
        padded = np.zeros((num, rows.shape[1]), np.float32)
        padded[: len(rows)] = rows
        norms = np.einsum("td,td->t", padded, padded, dtype=np.float64).astype(np.float32)
        return torch.from_numpy(padded).to(device), torch.from_numpy(norms).to(device)

    def _distances(self, x_SD: Tensor, x_norms_S: Tensor, y_TD: Tensor, y_norms_T: Tensor) -> Tensor:
        products_ST = torch.cat([products(x_SD, part) for part in y_TD.split(TILE_VECTORS)], dim=1)
        if self.distance == "cosine":
            return products_ST.neg_().add_(1)
        squares_ST = products_ST.mul_(-2).add_(x_norms_S[:, None]).add_(y_norms_T)
        return squares_ST.clamp_(min=0).div_(x_SD.shape[1])  # rounding may leave equal vectors below zero

    def _reduced(self, distances_ST: Tensor, offsets: np.ndarray) -> Tensor:
        """Distances [num_columns] of the sets; infinite for an empty one."""
        from wealy_ray.retrieval.kernels import best_pairs, nearest

        out = np.empty(len(offsets) - 1, np.float32)
        rows = distances_ST.cpu().numpy()
        if self._max_pairs:
            best_pairs(rows, offsets, self._max_pairs, out)
        else:
            nearest(rows, offsets, self.reduction == "mean_min", out)
        return torch.from_numpy(out)


def num_pairs(reduction: str) -> int:
    """The K of `bpwr-K`; 0 for the other reductions.

    Raises:
        ConfigError: No such reduction.
    """
    if reduction in ("min", "mean_min"):
        return 0
    match = re.fullmatch(r"bpwr-([1-9]\d*)", reduction)
    if match is None:
        raise ConfigError(
            f"unknown reduction '{reduction}'; there are min, mean_min and bpwr-K, e.g. bpwr-10"
        )
    return int(match.group(1))
