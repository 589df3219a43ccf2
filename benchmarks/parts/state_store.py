"""A store of synthetic states with its manifest: noise in pairs of versions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from wealy_ray.catalog import read_manifest, write_manifest
from wealy_ray.storage import Storage, join
from wealy_ray.store import IndexWriter, StoreReader, TrackCache, TrackStates, write_shard
from wealy_ray.training.crops import CropReader
from wealy_ray.training.data import Tracks

EXTRACTOR_ID = "0123456789abcdef"
TRACKS_PER_SHARD = 32
VALIDATION_TRACKS = 8
"""Four pairs, behind the training tracks."""


def write_store(storage: Storage, place: str, *, tracks: int, num_states: tuple[int, int], dim: int) -> int:
    """Writes `manifest.parquet` and `store/` below a folder or bucket.

    Args:
        storage: Where.
        place: Folder or bucket.
        tracks: Training tracks; a few of the validation split are added.
        num_states: Fewest and most states of a track.
        dim: Width of a state.

    Returns:
        Bytes of all shards.
    """
    root = join(place, "store", EXTRACTOR_ID)
    storage.write(join(root, "extractor.json"), b"{}")
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((num_states[1] + 1009, dim), np.float32).astype(np.float16)
    numbers = range(tracks + VALIDATION_TRACKS)
    receipts = []
    for first in range(0, len(numbers), TRACKS_PER_SHARD):
        shard = [
            _track(number, noise, int(rng.integers(num_states[0], num_states[1] + 1)))
            for number in numbers[first : first + TRACKS_PER_SHARD]
        ]
        receipts.append(
            write_shard(storage, root, shard, extractor_id=EXTRACTOR_ID, epoch=1, numerics={"from": "noise"})
        )
    receipt = pa.concat_tables(receipts)
    IndexWriter.claim(storage, root, manifest_digest="0" * 64, run_id="benchmark").publish(receipt)
    ids = [_id_of(number) for number in numbers]
    manifest = {
        "track_id": ids,
        "clique_id": [f"c{number // 2:07d}" for number in numbers],
        "split": ["train" if number < tracks else "val" for number in numbers],
        "audio_uri": [f"s3://nowhere/{i}" for i in ids],
    }
    write_manifest(storage, join(place, "manifest.parquet"), pa.table(manifest))
    return sum({row["shard"]: row["shard_bytes"] for row in receipt.to_pylist()}.values())


def _id_of(number: int) -> str:
    return f"noise:{number:07d}"


def _track(number: int, noise: np.ndarray, length: int) -> TrackStates:
    first = number * 37 % 1009  # its own piece of the noise, so that no two payloads are equal
    states = noise[first : first + length]
    nothing = np.zeros(length, np.int32)
    return TrackStates(
        _id_of(number),
        f"s3://nowhere/{number}",
        states=states,
        token_ids=nothing,
        kind=nothing.astype(np.int8),
        window=nothing.astype(np.int16),
    )


def open_split(
    storage: Storage, place: str, split: str, crop: int, cache: TrackCache | None = None
) -> tuple[Tracks, CropReader]:
    """A split of such a store, and who reads crops of it."""
    reader = StoreReader.open(storage, join(place, "store"))
    crops = CropReader(reader, crop, cache=cache)
    manifest = join(place, "manifest.parquet")
    return Tracks.of_split(read_manifest(storage, manifest).table, manifest, split, crops), crops


def forget(folder: Path) -> None:
    """Lets the kernel forget what it has read of a folder's files, so that they come from the disk again."""
    for path in folder.rglob("*.parquet"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are still to be written would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
