"""Vectors of a collection that does not fit into memory: tiles in storage, read one after the other.

A folder holds one file of raw float32 per tile and `tiles.json`, written last: who finds it finds all tiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wealy_ray.errors import StoreError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.imports import VectorSource
from wealy_ray.retrieval.multi_vector import TILE_VECTORS, VectorTile, cut_tiles
from wealy_ray.storage import Storage, join

DTYPE = np.dtype("<f4")


@dataclass(frozen=True, eq=False)
class StoredSets:
    """See `VectorSets`; two tiles are in memory at a time: one in use, the next on its way.

    Attributes:
        storage: Access.
        folder: Where the tiles are.
        sizes: int64 [num_tracks], vectors of each track of the collection.
        is_candidate: bool [num_tracks].
        dim: Numbers of a vector.
    """

    storage: Storage
    folder: str
    sizes: np.ndarray
    is_candidate: np.ndarray
    dim: int

    @cached_property
    def _bounds(self) -> list[int]:
        """First track of each tile, and the number of tracks."""
        return [first for first, _ in cut_tiles(self.sizes)] + [len(self.sizes)]

    @classmethod
    def write(cls, storage: Storage, folder: str, collection: Collection, source: VectorSource) -> StoredSets:
        """Writes the collection's tracks; what is there already is used as it is.

        Args:
            storage: Access.
            folder: A folder for this source and this collection alone.
            collection: The tracks.
            source: Their vectors, and those of others, maybe.

        Raises:
            StoreError: NaN or infinity, with the ids; nothing is left that looks complete.
        """
        done = join(folder, "tiles.json")
        if not storage.exists(done):
            sizes, dim = _write_tiles(storage, folder, collection, source)
            storage.write(done, json.dumps({"sizes": sizes, "dim": dim}).encode())
        found = json.loads(storage.read(done))
        return cls(storage, folder, np.array(found["sizes"], np.int64), collection.is_candidate, found["dim"])

    def of(self, track: int) -> np.ndarray:
        """See `VectorSets`."""
        tile = int(np.searchsorted(self._bounds, track, side="right")) - 1
        start = int(self.sizes[self._bounds[tile] : track].sum()) * self.dim * DTYPE.itemsize
        length = int(self.sizes[track]) * self.dim * DTYPE.itemsize
        return self._vectors(self.storage.read_range(_uri(self.folder, tile), start, length), length)

    def tiles(self) -> Iterator[VectorTile]:
        """See `VectorSets`."""
        bounds = self._bounds
        if len(bounds) < 2:
            return
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._tile, 0)
            for tile in range(len(bounds) - 1):
                vectors = coming.result()
                if tile + 2 < len(bounds):
                    coming = pool.submit(self._tile, tile + 1)
                tracks = slice(bounds[tile], bounds[tile + 1])
                sizes, answers = self.sizes[tracks], self.is_candidate[tracks]
                if not answers.all():
                    vectors, sizes = vectors[np.repeat(answers, sizes)], sizes[answers]
                yield VectorTile(vectors, np.cumsum([0, *sizes], dtype=np.int64))

    def _tile(self, tile: int) -> np.ndarray:
        first, last = self._bounds[tile : tile + 2]
        length = int(self.sizes[first:last].sum()) * self.dim * DTYPE.itemsize
        return self._vectors(self.storage.read(_uri(self.folder, tile)), length)

    def _vectors(self, data: bytes, length: int) -> np.ndarray:
        if len(data) != length:
            raise StoreError(
                f"a tile in {self.folder} is damaged; remove the folder and run the same command again"
            )
        return np.frombuffer(data, DTYPE).reshape(-1, self.dim)


def _uri(folder: str, tile: int) -> str:
    return join(folder, f"{tile:06d}.f32")


def _write_tiles(
    storage: Storage, folder: str, collection: Collection, source: VectorSource
) -> tuple[list[int], int]:
    """Writes tiles as `cut_tiles` cuts them; returns the tracks' sizes and the dimension."""
    place = {track_id: i for i, track_id in enumerate(collection.track_ids)}
    sizes = [0] * len(collection)
    waiting: list[np.ndarray] = []
    tile = filled = 0
    dim = 1
    for track_id, vectors in source.tracks():
        dim = vectors.shape[1]
        if track_id not in place:
            continue
        sizes[place[track_id]] = len(vectors)
        if filled and filled + len(vectors) > TILE_VECTORS:
            storage.write(_uri(folder, tile), _bytes(waiting))
            tile, filled, waiting = tile + 1, 0, []
        waiting.append(vectors)
        filled += len(vectors)
    storage.write(_uri(folder, tile), _bytes(waiting))
    return sizes, dim


def _bytes(vectors: list[np.ndarray]) -> bytes:
    return b"".join(np.ascontiguousarray(v, DTYPE).tobytes() for v in vectors)
