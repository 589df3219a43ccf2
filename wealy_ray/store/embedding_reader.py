"""Reading embeddings: one track's vectors, or all, by the index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.errors import StoreError
from wealy_ray.storage import Storage, join
from wealy_ray.storage.ahead import read_ahead
from wealy_ray.store.embeddings import checksum_of_vectors, embedder_id_of, is_embedded, read_shard
from wealy_ray.store.extractor import read_settings
from wealy_ray.store.index import Index, read_index, read_latest
from wealy_ray.store.shard import shard_uri

READERS = 4
"""Shards that are read at a time."""


@dataclass(frozen=True, eq=False)
class EmbeddingReader:
    """One embedder's vectors, as one index names them.

    Attributes:
        storage: Where the store is.
        root: `<store>/<extractor-id>/embeddings/<embedder-id>`.
        index: The snapshot; work that goes on meanwhile does not change it.
        settings: What `embedder.json` says.
    """

    storage: Storage
    root: str
    index: Index
    settings: Mapping[str, Any]

    @classmethod
    def open(cls, storage: Storage, root: str, index_number: int | None = None) -> EmbeddingReader:
        """Opens an index.

        Args:
            storage, root: See the class.
            index_number: Which snapshot; None: the latest.

        Raises:
            StoreError: Nothing is there, or it is damaged.
        """
        settings = read_settings(storage, join(root, "embedder.json"))
        if not settings:
            raise StoreError(f"there are no embeddings at {root}: it has no embedder.json, or a damaged one")
        index = read_index(storage, root, index_number) if index_number else read_latest(storage, root)
        if index is None:
            raise StoreError(f"the embeddings {root} have no index yet: `wealy embed` has not begun")
        return cls(storage, root, index, settings)

    @property
    def embedder_id(self) -> str:
        """Last part of `root`."""
        return embedder_id_of(self.root)

    @cached_property
    def ok(self) -> pa.Table:
        """Index rows of tracks with vectors, by track_id."""
        return self.index.table.filter(pc.equal(self.index.table["status"], "ok"))

    def vectors(self, track_id: str) -> np.ndarray | None:
        """Vectors float32 [num_windows, dim] of a track; None where it has none.

        Raises:
            StoreError: Its shard is gone or damaged.
        """
        row = self.index.row(track_id)
        return None if row is None or row["status"] != "ok" else self.shard(row["shard"])[track_id]

    def shard(self, name: str) -> dict[str, np.ndarray]:
        """Vectors of the tracks that the index finds in a shard, verified.

        Raises:
            StoreError: It is gone, damaged, or was replaced.
        """
        all_vectors, _ = read_shard(self.storage, self.root, name)
        found = {}
        for row in self._by_shard[name]:
            vectors = all_vectors[row["row"] : row["row"] + row["num_windows"]]
            if checksum_of_vectors(vectors) != row["checksum"]:
                raise StoreError(
                    f"the shard {shard_uri(self.root, name)} does not hold the vectors of track '{row['track_id']}' "
                    "as the index says: it was replaced; remove it, and `wealy embed` makes it again"
                )
            found[row["track_id"]] = vectors
        return found

    def shards(self) -> Iterator[dict[str, np.ndarray]]:
        """All shards, one after the other, read ahead."""
        return read_ahead(self.shard, self._by_shard, READERS)

    def tracks(self) -> Iterator[tuple[str, np.ndarray]]:
        """(track id, vectors), ids ascending; a shard is held until its last track is given.

        Workers fill shards in the order of ids, so few are held at a time.
        """
        coming = self.shards()  # in the order of their first tracks
        held: dict[str, dict[str, np.ndarray]] = {}
        for track_id, name in zip(self.ok["track_id"].to_pylist(), self.ok["shard"].to_pylist(), strict=True):
            if name not in held:
                held[name] = next(coming)
            yield track_id, held[name].pop(track_id)
            if not held[name]:
                del held[name]

    @cached_property
    def _by_shard(self) -> dict[str, list[dict[str, Any]]]:
        """Index rows of each shard, in the order of the shards' first tracks."""
        grouped: dict[str, list[dict[str, Any]]] = {}
        for row in self.ok.select(["track_id", "shard", "row", "num_windows", "checksum"]).to_pylist():
            grouped.setdefault(row["shard"], []).append(row)
        return grouped


def count_stale(wanted: pa.Table, embeddings: Index) -> int:
    """Tracks whose vectors are missing, or of other states than the store has now.

    Args:
        wanted: Rows of the index of the states.
        embeddings: The index of the vectors.
    """
    return int((~is_embedded(wanted, embeddings)).sum())
