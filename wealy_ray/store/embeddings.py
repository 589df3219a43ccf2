"""Embeddings beside the states they were computed of: shards of vectors, and the index that commits them.

A shard is plain Parquet with one row per (track, window). Its metadata carries the receipt (the index rows of its
tracks, failed ones included) and a checksum of the whole file, which is verified before anything parses it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wealy_ray.errors import StoreError
from wealy_ray.storage import ObjectMissingError, Storage
from wealy_ray.store.adopt import Adoption, adopt_shards
from wealy_ray.store.index import Index, one_chunk
from wealy_ray.store.schema import FORMAT_VERSION, checksum_of
from wealy_ray.store.seal import PLACEHOLDER, is_sealed, seal
from wealy_ray.store.shard import shard_uri

VECTORS_DTYPE = np.dtype("<f4")

EMBEDDING_INDEX_SCHEMA = pa.schema(
    [
        ("track_id", pa.string()),
        ("status", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("source_checksum", pa.string()),  # of the states: others are not done
        ("num_states", pa.int32()),  # of those that count
        ("num_windows", pa.int32()),
        ("dim", pa.int32()),
        ("shard", pa.string()),
        ("shard_bytes", pa.int64()),
        ("row", pa.int32()),  # the first of num_windows
        ("checksum", pa.string()),
    ]
)
"""Columns of an index of embeddings, and of the receipt that a shard's writer returns."""


@dataclass(frozen=True, eq=False)
class TrackVectors:
    """One track's result.

    Attributes:
        track_id: The track.
        source_checksum: Of its states, as their index has it.
        num_states: States that count.
        vectors: float32 [num_windows, dim]; none for a failed track.
        error_type, error_message: Why it failed; None: it is ok.
    """

    track_id: str
    source_checksum: str
    num_states: int
    vectors: np.ndarray
    error_type: str | None = None
    error_message: str | None = None


def write_vectors(
    storage: Storage, root: str, tracks: Sequence[TrackVectors], dim: int, facts: Mapping[str, str]
) -> pa.Table:
    """Writes tracks as one new shard, atomically.

    Args:
        storage: Where to write.
        root: `<store>/<extractor-id>/embeddings/<embedder-id>`.
        tracks: At least one; each id once.
        dim: Numbers of a vector.
        facts: For the file's metadata: model_digest, extractor_id, index, epoch, numerics.

    Returns:
        The receipt (`EMBEDDING_INDEX_SCHEMA`).

    Raises:
        StorageError, TransientError: The storage refuses, or does not answer.
    """
    assert len({t.track_id for t in tracks}) == len(tracks) > 0, (
        "an empty shard, or a track that stands twice"
    )
    name = f"{uuid.uuid4()}.parquet"
    sizes = [len(t.vectors) for t in tracks]
    flat = np.concatenate([t.vectors.reshape(-1, dim) for t in tracks]).astype(VECTORS_DTYPE, copy=False)
    table = pa.table(
        {
            "track_id": pa.array(
                np.repeat(np.array([t.track_id for t in tracks], object), sizes), pa.string()
            ),
            "window": pa.array(np.concatenate([np.arange(n) for n in sizes]), pa.int32()),
            "z": pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), dim),
        }
    )
    first_rows = np.cumsum([0, *sizes]).tolist()
    rows = [
        {
            "track_id": t.track_id,
            "status": "ok" if t.error_type is None else "failed",
            "error_type": t.error_type,
            "error_message": t.error_message,
            "source_checksum": t.source_checksum,
            "num_states": t.num_states,
            "num_windows": len(t.vectors),
            "dim": dim if t.error_type is None else 0,
            "row": row,
            "checksum": checksum_of_vectors(t.vectors),
        }
        for t, row in zip(tracks, first_rows[:-1], strict=True)
    ]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, compression="none", use_dictionary=["track_id"], write_page_checksum=True
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(
            {
                "wealy_format": FORMAT_VERSION,
                "embedder_id": embedder_id_of(root),
                **facts,
                "receipt": json.dumps(rows),
                "checksum": PLACEHOLDER,
            }
        )
    data = seal(sink.getvalue().to_pybytes())
    storage.write(shard_uri(root, name), data)
    return _receipt(rows, name, len(data))


def read_shard(storage: Storage, root: str, name: str) -> tuple[np.ndarray, pa.Table]:
    """A shard's vectors float32 [rows, dim], and its receipt, verified.

    Raises:
        StoreError: It is gone, damaged, or of another embedder.
    """
    uri = shard_uri(root, name)
    try:
        data = storage.read(uri)
    except ObjectMissingError as e:
        raise StoreError(f"the shard of embeddings {uri} is gone: `wealy embed` makes it again") from e
    if not is_sealed(data):
        raise StoreError(
            f"the shard of embeddings {uri} is damaged (its checksum is missing or wrong): remove it, and `wealy "
            "embed` makes it again"
        )
    file = pq.ParquetFile(pa.BufferReader(data))
    values = {k.decode(): v.decode() for k, v in file.metadata.metadata.items()}
    if (values["wealy_format"], values["embedder_id"]) != (FORMAT_VERSION, embedder_id_of(root)):
        raise StoreError(
            f"the shard {uri} is of embedder {values['embedder_id']} and format {values['wealy_format']}, and does "
            "not belong here: move it away, and `wealy embed` makes again what is missing"
        )
    z = one_chunk(file.read(columns=["z"])["z"])
    dim = file.schema_arrow.field("z").type.list_size
    vectors = z.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return vectors, _receipt(json.loads(values["receipt"]), name, len(data))


def adopt_embeddings(storage: Storage, root: str, index: Index | None, wanted: pa.Table) -> Adoption:
    """Finds finished work in shards that the index does not name, because their driver died.

    Args:
        storage: Where the store is.
        root: `<store>/<extractor-id>/embeddings/<embedder-id>`.
        index: The latest index.
        wanted: Tracks still to be done: columns track_id and checksum (of their states).
    """
    asked = dict(zip(wanted["track_id"].to_pylist(), wanted["checksum"].to_pylist(), strict=True))

    def look(name: str) -> pa.Table:
        _, receipt = read_shard(storage, root, name)
        pairs = zip(receipt["track_id"].to_pylist(), receipt["source_checksum"].to_pylist(), strict=True)
        return receipt.filter(
            pa.array([asked.get(track_id) == found for track_id, found in pairs], pa.bool_())
        )

    return adopt_shards(storage, root, index, look if asked else None, EMBEDDING_INDEX_SCHEMA)


def is_embedded(wanted: pa.Table, index: Index | None) -> np.ndarray:
    """Which tracks were embedded of the states that are wanted, bool [num_rows].

    Args:
        wanted: Columns track_id and checksum (of the states).
        index: Of the embeddings; None: nothing was.
    """
    if index is None or not len(index) or not wanted.num_rows:
        return np.zeros(wanted.num_rows, bool)
    positions = index.positions(wanted["track_id"])
    found = index.table["source_checksum"].take(pc.fill_null(positions, 0))
    same = pc.and_(pc.equal(found, wanted["checksum"]), pc.is_valid(positions))
    return np.asarray(same, bool)


def checksum_of_vectors(vectors: np.ndarray) -> str:
    """Of their bytes as they stand in a shard."""
    return checksum_of(np.ascontiguousarray(vectors, VECTORS_DTYPE).tobytes())


def embedder_id_of(root: str) -> str:
    """The last part of an embedding's folder."""
    return root.rstrip("/").rsplit("/", 1)[-1]


def _receipt(rows: list[dict[str, Any]], name: str, size: int) -> pa.Table:
    full = [{**row, "shard": name, "shard_bytes": size} for row in rows]
    return pa.Table.from_pylist(full, schema=EMBEDDING_INDEX_SCHEMA)
