"""Shards: immutable Parquet files of tracks, whose footers carry the receipt.

A row group holds one track, uncompressed, so the bytes of its states lie contiguously in the file: an index
of (shard, offset, length) gives any track, or a crop of it, with one ranged read. The receipt (the index rows
of the file's own tracks) is stored in the footer as JSON, so that a shard's tail is enough to adopt it.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wealy_ray.errors import StoreError
from wealy_ray.storage import ObjectMissingError, Storage, join
from wealy_ray.store.schema import (
    FORMAT_VERSION,
    INDEX_SCHEMA,
    SHARD_SCHEMA,
    STATES_DTYPE,
    WITHOUT_STATES,
    TrackStates,
    checksum_of,
    runs_of,
)
from wealy_ray.store.seal import PLACEHOLDER, is_sealed, seal

MAGIC = b"PAR1"
TAIL_BYTES = 256 * 1024
"""First guess of a footer's size: 64 tracks take about 150 kB."""
STATES_COLUMN = -1
"""Place of `states` among a row group's column chunks."""
NUM_THREADS = 8
"""Rows that are read at the same time."""
MADE_AGAIN = "the command that wrote this store (as a rule `wealy extract`) makes it again"


def write_shard(
    storage: Storage,
    root: str,
    tracks: Sequence[TrackStates],
    *,
    extractor_id: str,
    epoch: int,
    numerics: dict[str, str],
) -> pa.Table:
    """Writes tracks as one new shard, atomically.

    Args:
        storage: Where to write.
        root: `<store>/<extractor_id>`.
        tracks: At least one; each id once.
        extractor_id: What the states were computed with.
        epoch: Epoch of the driver that runs this writer.
        numerics: What may change rounding but not the extractor: device, dtype, batch sizes.

    Returns:
        The receipt: the tracks' index rows (`INDEX_SCHEMA`).

    Raises:
        StorageError, TransientError: The storage refuses, or does not answer.
    """
    assert tracks, "an empty shard"
    ids = {t.track_id for t in tracks}
    assert len(ids) == len(tracks), "a track stands twice in one shard"
    name = f"{uuid.uuid4()}.parquet"
    sink = io.BytesIO()
    rows = []
    with pq.ParquetWriter(
        sink,
        SHARD_SCHEMA,
        compression="none",
        use_dictionary=False,
        write_statistics=["track_id", "status", "language"],
        write_page_checksum=True,
    ) as writer:
        for number, track in enumerate(tracks):
            payload = pa.py_buffer(np.ascontiguousarray(track.states, STATES_DTYPE))
            writer.write_table(track.to_row(payload))
            rows.append(_receipt_row(track, payload, name, number, end=sink.tell()))
        with sink.getbuffer() as view:
            ends = [r["payload_offset"] + r["num_states"] * r["dim"] * STATES_DTYPE.itemsize for r in rows]
            starts = [len(MAGIC), *ends[:-1]]
            row_checksums = [checksum_of(view[a:b]) for a, b in zip(starts, ends, strict=True)]
        writer.add_key_value_metadata(
            {
                "wealy_format": FORMAT_VERSION,
                "extractor_id": extractor_id,
                "epoch": str(epoch),
                "numerics": json.dumps(numerics, sort_keys=True),
                "receipt": json.dumps(rows),
                "row_checksums": json.dumps(row_checksums),
                "footer_checksum": PLACEHOLDER,
            }
        )
    data = _seal_footer(sink)
    metadata = pq.read_metadata(pa.BufferReader(data))
    assert _offsets_in(metadata, rows) == [r["payload_offset"] for r in rows], (
        "payloads are not where expected"
    )
    storage.write(shard_uri(root, name), data)
    return _receipt_table(rows, name, len(data))


def shard_uri(root: str, name: str) -> str:
    """URI of a shard."""
    return join(root, "shards", name)


def gone(uri: str, track_id: str | None = None) -> StoreError:
    """What to say of a shard that is not there."""
    of = "" if track_id is None else f" of track '{track_id}'"
    return StoreError(f"the shard {uri}{of} is gone: {MADE_AGAIN}")


def damaged(uri: str, how: str) -> StoreError:
    """What to say of a shard whose bytes are others than those that were written."""
    return StoreError(f"the shard {uri} is damaged: {how}; remove it, and {MADE_AGAIN}")


def read_receipt(storage: Storage, root: str, name: str, *, extractor_id: str | None = None) -> pa.Table:
    """Reads a shard's receipt from its footer, with ranged reads only.

    Args:
        storage: Where to read.
        root: `<store>/<extractor_id>`.
        name: File name of the shard.
        extractor_id: What the shard must have been computed with; None: the last part of `root`.

    Returns:
        `INDEX_SCHEMA` rows, one per track of the shard.

    Raises:
        StoreError: The shard is damaged, truncated, no shard of ours, or of another extractor.
    """
    uri = shard_uri(root, name)
    try:
        size = storage.info(uri).size
    except ObjectMissingError as e:
        raise StoreError(f"the shard {uri} does not exist") from e
    metadata = _read_footer(storage, uri, size)
    values = _values_of(metadata)
    if values["wealy_format"] != FORMAT_VERSION:
        raise StoreError(
            f"the shard {uri} has format {values['wealy_format']}, this version reads {FORMAT_VERSION}"
        )
    wanted = extractor_id or root.rstrip("/").rsplit("/", 1)[-1]
    if values["extractor_id"] != wanted:
        raise StoreError(f"the shard {uri} belongs to extractor {values['extractor_id']}, not to {wanted}")
    return _receipt_table(json.loads(values["receipt"]), name, size)


def verify_shard(storage: Storage, root: str, name: str, rows: pa.Table | None = None) -> None:
    """Reads payloads and compares them with their checksums.

    Args:
        storage: Where to read.
        root: `<store>/<extractor_id>`.
        name: File name of the shard.
        rows: Index rows of tracks in this shard; None: all tracks, by the shard's own receipt.

    Raises:
        StoreError: A payload is not what was written; names the shard and the track.
    """
    if rows is None:
        rows = read_receipt(storage, root, name)
    for row in rows.select(["track_id", "payload_offset", "num_states", "dim", "checksum"]).to_pylist():
        read_payload(storage, root, name, row)


def read_payload(storage: Storage, root: str, name: str, row: dict[str, Any]) -> bytes:
    """One track's payload, verified, by one ranged read.

    Raises:
        StoreError: The bytes do not match the row's checksum.
    """
    num_bytes = row["num_states"] * row["dim"] * STATES_DTYPE.itemsize
    try:
        payload = storage.read_range(shard_uri(root, name), row["payload_offset"], num_bytes)
    except ObjectMissingError as e:
        raise gone(shard_uri(root, name), row["track_id"]) from e
    if checksum_of(payload) != row["checksum"]:
        how = f"the states of track '{row['track_id']}' do not match their checksum"
        raise damaged(shard_uri(root, name), how)
    return payload


def read_row(storage: Storage, root: str, name: str, size: int, row: int) -> pa.Table:
    """One track's whole row (`SHARD_SCHEMA`), verified, by two ranged reads.

    Args:
        storage: Where to read.
        root: `<store>/<extractor_id>`.
        name: File name of the shard.
        size: Bytes of the shard.
        row: Number of the row, and of its row group.

    Raises:
        StoreError: The shard is damaged, truncated or gone.
    """
    uri = shard_uri(root, name)
    try:
        metadata = _read_footer(storage, uri, size)
        if row >= metadata.num_row_groups:
            raise damaged(uri, f"it has no row {row}")
        group = metadata.row_group(row)
        first = group.column(0).data_page_offset
        group_bytes = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        data = storage.read_range(uri, first, group_bytes)
    except ObjectMissingError as e:
        raise gone(uri) from e
    if checksum_of(data) != json.loads(_values_of(metadata)["row_checksums"])[row]:
        raise damaged(uri, f"row {row} does not match its checksum")
    return pq.ParquetFile(_Window(data, first, size), metadata=metadata).read_row_group(row)


def read_without_states(
    storage: Storage, root: str, name: str, size: int, rows: Sequence[int]
) -> list[pa.Table]:
    """Columns `WITHOUT_STATES` of some rows, by one ranged read for each of what stands before its payload.

    Args:
        storage: Where to read.
        root: `<store>/<extractor_id>`.
        name: File name of the shard.
        size: Bytes of the shard.
        rows: Numbers of the rows.

    Returns:
        A table of one row for each; verified by the checksums of its pages, since that of a row spans its payload.

    Raises:
        StoreError: The shard is damaged, truncated or gone.
    """
    uri = shard_uri(root, name)
    try:
        metadata = _read_footer(storage, uri, size)
    except ObjectMissingError as e:
        raise gone(uri) from e

    def read(row: int) -> pa.Table:
        if row >= metadata.num_row_groups:
            raise damaged(uri, f"it has no row {row}")
        group = metadata.row_group(row)
        first = group.column(0).data_page_offset
        end = group.column(group.num_columns + STATES_COLUMN).data_page_offset
        window = _Window(storage.read_range(uri, first, end - first), first, size)
        try:
            file = pq.ParquetFile(window, metadata=metadata, page_checksum_verification=True)
            return file.read_row_group(row, columns=WITHOUT_STATES)
        except (OSError, ValueError, pa.ArrowException) as e:
            raise damaged(uri, f"row {row} cannot be read ({e})") from e

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(read, rows))


class _Window(io.RawIOBase):
    """A file of which only the bytes from `first` on are at hand; the rest is not asked for."""

    def __init__(self, data: bytes, first: int, size: int) -> None:
        super().__init__()
        self._data, self._first, self._size, self._place = memoryview(data), first, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        begin = self._place - self._first
        end = begin + size if size >= 0 else len(self._data)
        if begin < 0 or end > len(self._data):
            raise ValueError("a page lies outside of its row group")
        self._place += end - begin
        return bytes(self._data[begin:end])


def _read_footer(storage: Storage, uri: str, size: int) -> pq.FileMetaData:
    """A Parquet footer by one or two ranged reads.

    Raises:
        StoreError: No footer, or not a readable one.
    """
    tail = storage.read_range(uri, max(0, size - TAIL_BYTES), min(size, TAIL_BYTES))
    if len(tail) < 12 or tail[-4:] != MAGIC:
        raise damaged(uri, "it is truncated or no shard, since it does not end as a Parquet file does")
    footer_bytes = _footer_bytes(tail)
    if footer_bytes + len(MAGIC) > size:
        raise damaged(uri, f"its footer claims {footer_bytes} of {size} bytes")
    if footer_bytes > len(tail):
        tail = storage.read_range(uri, size - footer_bytes, footer_bytes)
    footer = tail[-footer_bytes:]
    if not is_sealed(footer):
        raise damaged(uri, "its footer has no valid checksum, or it is no shard of a store")
    return pq.read_metadata(pa.BufferReader(MAGIC + footer))


def _footer_bytes(tail: bytes) -> int:
    """Length of a Parquet footer with the 8 bytes behind it."""
    return int.from_bytes(tail[-8:-4], "little") + 8


def _seal_footer(file: io.BytesIO) -> bytes:
    """The bytes of a Parquet file with a placeholder in its footer, sealed."""
    size = file.seek(0, io.SEEK_END)
    file.seek(size - 8)
    footer_bytes = _footer_bytes(file.read())
    file.seek(size - footer_bytes)
    footer = seal(file.read())
    file.seek(size - footer_bytes)
    file.write(footer)
    return file.getvalue()


def _values_of(metadata: pq.FileMetaData) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in metadata.metadata.items()}


def _receipt_row(track: TrackStates, payload: pa.Buffer, name: str, row: int, *, end: int) -> dict[str, Any]:
    return {
        "track_id": track.track_id,
        "status": track.status,
        "error_type": track.error_type,
        "audio_uri": track.audio_uri,
        "audio_etag": track.audio_etag,
        "audio_size": track.audio_size,
        "manifest_etag": track.manifest_etag,
        "duration_s": track.duration_s,
        "language": track.language,
        "num_windows": len(track.windows),
        "shard": name,
        "shard_bytes": None,  # known once the footer is written: filled in by `_receipt_table`
        "row": row,
        "payload_offset": end - payload.size,
        "num_states": track.num_states,
        "dim": track.dim,
        "kind_runs": runs_of(track.kind),
        "checksum": checksum_of(payload),
    }


def _receipt_table(rows: list[dict[str, Any]], name: str, size: int) -> pa.Table:
    return pa.Table.from_pylist(
        [{**r, "shard": name, "shard_bytes": size} for r in rows], schema=INDEX_SCHEMA
    )


def _offsets_in(metadata: pq.FileMetaData, rows: list[dict[str, Any]]) -> list[int]:
    """Where the footer says that the payloads lie: at the ends of their column chunks."""
    offsets = []
    for number, row in enumerate(rows):
        group = metadata.row_group(number)
        column = group.column(group.num_columns + STATES_COLUMN)
        num_bytes = row["num_states"] * row["dim"] * STATES_DTYPE.itemsize
        offsets.append(column.data_page_offset + column.total_compressed_size - num_bytes)
    return offsets
