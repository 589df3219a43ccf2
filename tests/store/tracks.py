"""Tracks and places for the store's tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from wealy_ray.storage import Storage
from wealy_ray.store import TrackStates, WindowInfo, write_shard
from wealy_ray.store.shard import shard_uri

EXTRACTOR_ID = "0123456789abcdef"


class CountingStorage(Storage):
    """Storage that notes what was read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reads: list[tuple[str, str, int, int]] = []

    def read(self, uri: str) -> bytes:
        self.reads.append(("read", uri, 0, -1))
        return super().read(uri)

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        self.reads.append(("read_range", uri, offset, length))
        return super().read_range(uri, offset, length)


def make_track(number: int, num_states: int = 12, dim: int = 8, **changes: Any) -> TrackStates:
    rng = np.random.default_rng([number, num_states, dim])
    kind = np.sort(rng.integers(0, 5, num_states)).astype(np.int8)
    values: dict[str, Any] = {
        "track_id": f"set:V-{number}",
        "audio_uri": f"s3://audio/{number}.mp3",
        "audio_etag": f"etag-{number}",
        "audio_size": 1000 + number,
        "manifest_etag": f"etag-{number}",
        "warnings": ("truncated after 41.2 s",) if number % 2 else (),
        "duration_s": 41.2,
        "language": "pt",
        "language_probability": 0.5,
        "states": rng.standard_normal((num_states, dim)).astype(np.float16),
        "token_ids": rng.integers(0, 51_865, num_states).astype(np.int32),
        "kind": kind,
        "window": (np.arange(num_states) // 7).astype(np.int16),
        "windows": (
            WindowInfo(0.0, 30.0, "pt", "l\u00e1 l\u00e1", 0.25, -0.5, 1.5, 0.0),
            WindowInfo(25.0, 41.2, None, "", 0.75, -1.0, 0.5, 0.0),
        ),
        "text": "l\u00e1 l\u00e1 \U0001f3b5",
    }
    return TrackStates(**{**values, **changes})


def make_failed(number: int) -> TrackStates:
    return TrackStates.failed(
        f"set:V-{number}",
        f"s3://audio/{number}.mp3",
        "not_audio",
        "the bytes are no audio",
        audio_etag=f"etag-{number}",
        audio_size=3,
        manifest_etag=f"etag-{number}",
    )


def write(storage: Storage, root: str, tracks: Iterable[TrackStates], **changes: Any) -> pa.Table:
    values: dict[str, Any] = {
        "extractor_id": EXTRACTOR_ID,
        "epoch": 1,
        "numerics": {"device": "cpu", "dtype": "float32"},
    }
    return write_shard(storage, root, list(tracks), **{**values, **changes})


def shard_of(receipt: pa.Table) -> str:
    return receipt["shard"][0].as_py()


def damage(storage: Storage, root: str, name: str, change: Any) -> None:
    uri = shard_uri(root, name)
    storage.write(uri, change(storage.read(uri)))


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def manifest_of(numbers: Iterable[int], *, etags: bool = True) -> pa.Table:
    numbers = list(numbers)
    return pa.table(
        {
            "track_id": [f"set:V-{n}" for n in numbers],
            "audio_uri": [f"s3://audio/{n}.mp3" for n in numbers],
            "etag": pa.array([f"etag-{n}" if etags else None for n in numbers], pa.string()),
        }
    )


def assert_same(a: TrackStates, b: TrackStates) -> None:
    for name in TrackStates.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(x, y, err_msg=name)
        elif name == "windows":
            assert tuple(x) == tuple(y)
        else:
            assert x == y, name
