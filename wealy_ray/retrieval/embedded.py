"""What `wealy embed` left beside a store's states, as vectors to evaluate and to search in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from wealy_ray.errors import StoreError
from wealy_ray.retrieval.scores import unit_rows
from wealy_ray.storage import Storage, join
from wealy_ray.store import EmbeddingReader, embeddings_folder, list_embedders


@dataclass(frozen=True, eq=False)
class StoreVectors:
    """One embedder's vectors as a `VectorSource`.

    Attributes:
        reader: The vectors.
    """

    reader: EmbeddingReader

    @classmethod
    def open(cls, storage: Storage, states_root: str, embedder_id: str | None) -> StoreVectors:
        """Opens the embeddings beside some states.

        Args:
            storage: Access.
            states_root: `<store>/<extractor-id>`.
            embedder_id: Which; None: the only ones.

        Raises:
            StoreError: There are none, the choice is not clear or not there, or the index is damaged.
        """
        choices = list_embedders(storage, states_root)
        listed = ", ".join(choices)
        if not choices:
            raise StoreError(f"the store {states_root} has no embeddings: `wealy embed` makes them")
        if embedder_id is None:
            if len(choices) > 1:
                raise StoreError(
                    f"the store {states_root} has embeddings of several kinds, set embedder_id to one of {listed}"
                )
            embedder_id = next(iter(choices))
        elif embedder_id not in choices:
            raise StoreError(f"the store {states_root} has no embeddings '{embedder_id}'; it has {listed}")
        return cls(EmbeddingReader.open(storage, join(embeddings_folder(states_root), embedder_id)))

    @property
    def num_bytes(self) -> int:
        """See `VectorSource`."""
        rows = self.reader.ok
        return 4 * (pc.sum(pc.multiply(rows["num_windows"].cast("int64"), rows["dim"])).as_py() or 0)

    @property
    def version(self) -> Sequence[object]:
        """See `VectorSource`."""
        return [self.reader.embedder_id, self.reader.index.number]

    def tracks(self) -> Iterator[tuple[str, np.ndarray]]:
        """See `VectorSource`."""
        return self.reader.tracks()


def nearest_tracks(
    reader: EmbeddingReader, vectors: np.ndarray, asked: str, top: int
) -> list[tuple[str, float]]:
    """(track id, cosine of the nearest pair of vectors) of the nearest tracks, exactly; the nearest first.

    Args:
        reader: The tracks; their shards are read one after the other.
        vectors: float32 [S, z] of the query.
        asked: Its id; it does not find itself.
        top: How many.
    """
    query = unit_rows(vectors)
    best: list[tuple[str, float]] = []
    for shard in reader.shards():
        others = [(track_id, found) for track_id, found in shard.items() if track_id != asked]
        if not others:
            continue
        starts = np.cumsum([0, *(len(found) for _, found in others[:-1])])
        cosines = query @ unit_rows(np.concatenate([found for _, found in others])).T
        nearest = np.maximum.reduceat(cosines.max(axis=0), starts)
        best += [(track_id, float(c)) for (track_id, _), c in zip(others, nearest, strict=True)]
        best = sorted(best, key=lambda pair: (-pair[1], pair[0]))[:top]
    return best
