"""Where the states of every track lie, as columns of numbers: reading crops of them costs a look-up and one read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.storage import ObjectMissingError, Storage
from wealy_ray.store.cache import TrackCache
from wealy_ray.store.index import Index, one_chunk
from wealy_ray.store.schema import STATES_DTYPE, checksum_of
from wealy_ray.store.shard import damaged, gone, shard_uri


@dataclass(frozen=True, eq=False)
class Payloads:
    """The payloads of an index, by its rows.

    A track is verified by its checksum when it is first read whole, and when it is brought into the cache: training
    comes again in every epoch, and a checksum takes ten times as long as a read from memory.

    Attributes:
        storage: Where the store is.
        root: `<store>/<extractor-id>`.
        track_ids: Of each row, ascending.
        shards: Names.
        shard: int32 [num_rows], place in `shards`.
        offset: int64 [num_rows], of the first byte in the shard.
        num_states: int32 [num_rows]; 0 for failed tracks.
        checksum: uint8 [num_rows, 16].
        dim: Width of a state.
        cache: Keeps what comes from a remote store; None: nothing does.
    """

    storage: Storage
    root: str
    track_ids: pa.Array
    shards: list[str]
    shard: np.ndarray
    offset: np.ndarray
    num_states: np.ndarray
    checksum: np.ndarray
    dim: int
    cache: TrackCache | None
    _verified: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_verified", np.zeros(len(self), bool))

    def __len__(self) -> int:
        return len(self.track_ids)

    def __getstate__(self) -> dict[str, Any]:
        # another process may read through another path: it verifies for itself
        return {name: value for name, value in self.__dict__.items() if name != "_verified"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @classmethod
    def of(cls, storage: Storage, root: str, index: Index, cache: TrackCache | None = None) -> Payloads:
        """Columns of an index.

        Args:
            storage: Where the store is.
            root: `<store>/<extractor-id>`.
            index: The snapshot.
            cache: Used unless the store lies on this machine's file systems.
        """
        rows = index.table.select(["shard", "payload_offset", "num_states", "dim", "checksum"])
        shards = one_chunk(rows["shard"]).dictionary_encode()
        digits = "".join(pc.fill_null(rows["checksum"], "0" * 32).to_pylist())
        dims = rows["dim"].fill_null(0).to_numpy()
        return cls(
            storage,
            root,
            one_chunk(index.table["track_id"]),
            shards.dictionary.to_pylist(),
            shards.indices.fill_null(0).to_numpy(),
            rows["payload_offset"].fill_null(0).to_numpy(),
            rows["num_states"].fill_null(0).to_numpy(),
            np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(len(rows), 16),
            int(dims.max(initial=0)),
            None if storage.is_local(root) else cache,
        )

    def read(self, row: int, start: int, out: np.ndarray) -> None:
        """Fills `out` with states of a track, by one read of exactly these bytes (of the track, where it is cached).

        Args:
            row: The track's row of the index.
            start: First state.
            out: float16 [n, dim], contiguous; n states from `start` on are within the track.

        Raises:
            StoreError: Damaged or missing shard.
        """
        assert 0 <= start <= start + len(out) <= self.num_states[row], "states outside of the track"
        if not out.size:
            return
        state_bytes = self.dim * STATES_DTYPE.itemsize
        view = out.data.cast("B")
        if self.cache is not None:
            self._read_cached(self.cache, row, start * state_bytes, view)
            return
        self._fetch(row, start * state_bytes, view)
        if len(out) == self.num_states[row] and not self._verified[row]:
            self._verify(row, view)

    def _read_cached(self, cache: TrackCache, row: int, first: int, out: memoryview) -> None:
        key = self.checksum[row].tobytes().hex()
        size = int(self.num_states[row]) * self.dim * STATES_DTYPE.itemsize
        if cache.read_into(key, size, first, out):
            if len(out) < size or self._verified[row]:
                return
            if checksum_of(out) == key:
                self._verified[row] = True
                return
            cache.drop(key)
        payload = memoryview(bytearray(size))
        self._fetch(row, 0, payload)
        self._verify(row, payload)
        cache.store(key, payload)
        out[:] = payload[first : first + len(out)]

    def _fetch(self, row: int, first: int, out: memoryview) -> None:
        uri = shard_uri(self.root, self.shards[self.shard[row]])
        try:
            count = self.storage.read_into(uri, int(self.offset[row]) + first, out)
        except ObjectMissingError as e:
            raise gone(uri, self.track_ids[row]) from e
        if count != len(out):
            raise damaged(uri, f"it is truncated within the states of track '{self.track_ids[row]}'")

    def _verify(self, row: int, payload: memoryview) -> None:
        if checksum_of(payload) != self.checksum[row].tobytes().hex():
            uri = shard_uri(self.root, self.shards[self.shard[row]])
            raise damaged(uri, f"the states of track '{self.track_ids[row]}' do not match their checksum")
        self._verified[row] = True
