"""Reading a store: random access to tracks and crops, by the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.errors import StoreError
from wealy_ray.storage import ObjectMissingError, Storage, join
from wealy_ray.store.extractor import list_extractors
from wealy_ray.store.index import Index, read_index, read_latest
from wealy_ray.store.schema import STATES_DTYPE, TrackStates, checksum_of, kinds_of, states_of
from wealy_ray.store.shard import damaged, gone, read_payload, read_row, read_without_states, shard_uri


class StoreReader:
    """One extractor's tracks, as one index names them.

    Attributes:
        storage: Where the store is.
        root: `<store>/<extractor-id>`.
        index: The snapshot; a store that grows meanwhile does not change it.
        extractor_id: What the states were computed with.
    """

    def __init__(self, storage: Storage, root: str, index: Index) -> None:
        self.storage, self.root = storage, root
        self.index = index
        self.extractor_id = root.rstrip("/").rsplit("/", 1)[-1]

    @classmethod
    def open(
        cls, storage: Storage, store: str, extractor_id: str | None = None, index_number: int | None = None
    ) -> StoreReader:
        """Opens a store for reading.

        Args:
            storage: Where the store is.
            store: Folder of the store.
            extractor_id: Which extractor; None: the only one there is.
            index_number: Which snapshot; None: the latest.

        Raises:
            StoreError: Nothing is there, the choice is not clear or not there, or the index is damaged.
        """
        choices = list_extractors(storage, store)
        listed = ", ".join(choices)
        if not choices:
            raise StoreError(f"there is no store at {store}: no folder there holds an extractor.json")
        if extractor_id is None:
            if len(choices) > 1:
                raise StoreError(f"the store {store} holds several extractors, name one of {listed}")
            extractor_id = next(iter(choices))
        elif extractor_id not in choices:
            raise StoreError(f"the store {store} holds no extractor '{extractor_id}'; it holds {listed}")
        root = join(store, extractor_id)
        index = read_index(storage, root, index_number) if index_number else read_latest(storage, root)
        if index is None:
            raise StoreError(f"the store {root} has no index yet: extraction has not begun")
        return cls(storage, root, index)

    def states(self, track_id: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """States of a track, or of a crop of it, by one ranged read of exactly these bytes.

        A whole track is verified by its checksum. A crop cannot be: only its length is checked.

        Args:
            track_id: The track.
            start: First state.
            stop: State after the last one; None: the end. Bounds are clipped to the track, like a slice's.

        Returns:
            float16 [stop - start, dim], read-only.

        Raises:
            StoreError: Unknown or failed track, damaged or missing shard.
        """
        row = self._ok_row(track_id)
        num_states, dim = row["num_states"], row["dim"]
        start, stop, _ = slice(start, stop).indices(num_states)
        if (start, stop) == (0, num_states):
            return states_of(read_payload(self.storage, self.root, row["shard"], row), dim)
        state_bytes = dim * STATES_DTYPE.itemsize
        num_bytes = max(0, stop - start) * state_bytes
        uri = shard_uri(self.root, row["shard"])
        try:
            data = self.storage.read_range(uri, row["payload_offset"] + start * state_bytes, num_bytes)
        except ObjectMissingError as e:
            raise gone(uri, track_id) from e
        if len(data) != num_bytes:
            raise damaged(uri, f"it is truncated within the states of track '{track_id}'")
        return states_of(data, dim)

    def track(self, track_id: str) -> TrackStates:
        """Everything about a track, ok or failed, verified.

        Raises:
            StoreError: Unknown track, damaged or missing shard.
        """
        row = self._row(track_id)
        table = read_row(self.storage, self.root, row["shard"], row["shard_bytes"], row["row"])
        found = (table["track_id"][0].as_py(), checksum_of(table["states"][0].as_buffer()))
        if found != (track_id, row["checksum"]):
            raise self._not_there(row)
        return TrackStates.from_row(table)

    def without_states(self, track_ids: Sequence[str]) -> list[TrackStates]:
        """Everything about tracks of one shard but their states, of which no byte is read.

        Raises:
            StoreError: Unknown track, damaged or missing shard.
        """
        rows = [self._row(track_id) for track_id in track_ids]
        (place,) = {(row["shard"], row["shard_bytes"]) for row in rows}
        tables = read_without_states(self.storage, self.root, *place, [row["row"] for row in rows])
        for row, table in zip(rows, tables, strict=True):
            if table["track_id"][0].as_py() != row["track_id"]:
                raise self._not_there(row)
        return [TrackStates.from_row(table) for table in tables]

    def kinds(self, track_id: str) -> np.ndarray:
        """Kinds of a track's states, int8 [num_states], from the index alone.

        Raises:
            StoreError: Unknown or failed track.
        """
        return kinds_of(self._ok_row(track_id)["kind_runs"])

    def failures(self) -> pa.Table:
        """Index rows of all failed tracks."""
        return self.index.table.filter(pc.equal(self.index.table["status"], "failed"))

    def _not_there(self, row: dict[str, Any]) -> StoreError:
        uri = shard_uri(self.root, row["shard"])
        return damaged(
            uri, f"it does not hold track '{row['track_id']}' at row {row['row']}, as the index says"
        )

    def _row(self, track_id: str) -> dict[str, Any]:
        row = self.index.row(track_id)
        if row is None:
            raise StoreError(
                f"track '{track_id}' is not in index {self.index.number} of {self.root}, which holds "
                f"{len(self.index)} tracks"
            )
        return row

    def _ok_row(self, track_id: str) -> dict[str, Any]:
        row = self._row(track_id)
        if row["status"] != "ok":
            raise StoreError(f"track '{track_id}' has no states: it failed ({row['error_type']})")
        return row
