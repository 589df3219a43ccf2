"""Embeddings beside the states: shards, adoption, and what a reader makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.store.tracks import EXTRACTOR_ID, damage, flip, shard_of
from wealy_ray.errors import StoreError
from wealy_ray.storage import Storage, join
from wealy_ray.store import (
    EMBEDDING_INDEX_SCHEMA,
    EmbedderSpec,
    EmbeddingReader,
    IndexWriter,
    TrackVectors,
    adopt_embeddings,
    is_embedded,
    list_embedders,
    write_vectors,
)

DIM = 5
SPEC = EmbedderSpec("weights", EXTRACTOR_ID, ("text",), {"mode": "windows", "size": 40, "stride": 4})


def vectors_of(track_id: str, num: int) -> np.ndarray:
    return np.random.default_rng([ord(c) for c in track_id]).normal(size=(num, DIM)).astype(np.float32)


def ok(track_id: str, num: int = 2, source: str = "s") -> TrackVectors:
    return TrackVectors(track_id, f"{source}-{track_id}", 40 + num, vectors_of(track_id, num))


def failed(track_id: str) -> TrackVectors:
    none = np.zeros((0, DIM), np.float32)
    return TrackVectors(track_id, f"s-{track_id}", 0, none, "no_states", "there are none")


def write(root: str, *tracks: TrackVectors) -> pa.Table:
    return write_vectors(Storage(), root, tracks, DIM, {"model_digest": "weights"})


@pytest.fixture
def root(tmp_path: Path) -> str:
    SPEC.ensure(Storage(), str(tmp_path), "models/one")
    return SPEC.root(str(tmp_path))


def publish(root: str, *receipts: pa.Table, run_id: str = "run") -> EmbeddingReader:
    writer = IndexWriter.claim(
        Storage(), root, manifest_digest="0" * 64, run_id=run_id, schema=EMBEDDING_INDEX_SCHEMA
    )
    writer.publish(pa.concat_tables(receipts))
    return EmbeddingReader.open(Storage(), root)


def test_vectors_come_back_in_the_order_of_ids(root: str) -> None:
    reader = publish(root, write(root, ok("c", 3), failed("b"), ok("a", 1)), write(root, ok("d"), ok("bb")))
    assert reader.index.counts() == {"ok": 4, "failed": 1}
    assert [(t, len(z)) for t, z in reader.tracks()] == [("a", 1), ("bb", 2), ("c", 3), ("d", 2)]
    for track_id, z in reader.tracks():
        np.testing.assert_array_equal(z, vectors_of(track_id, len(z)))
        np.testing.assert_array_equal(z, reader.vectors(track_id))
    assert reader.vectors("b") is None
    assert reader.vectors("zz") is None
    assert reader.settings["model"] == "models/one"


def test_plain_pyarrow_reads_a_shard(root: str) -> None:
    receipt = write(root, ok("a", 2), failed("b"), ok("c", 1))
    file = pq.ParquetFile(join(root, "shards", shard_of(receipt)))
    assert file.schema_arrow.field("z").type == pa.list_(pa.float32(), DIM)
    table = file.read()
    assert table["track_id"].to_pylist() == ["a", "a", "c"]
    assert table["window"].to_pylist() == [0, 1, 0]
    np.testing.assert_array_equal(np.array(table["z"].to_pylist()[:2], np.float32), vectors_of("a", 2))
    assert file.metadata.metadata[b"model_digest"] == b"weights"


def test_shards_of_a_dead_driver_are_adopted_for_the_same_states_only(root: str) -> None:
    named, lost, bad = write(root, ok("a")), write(root, ok("b"), ok("c", source="old")), write(root, ok("d"))
    reader = publish(root, named)
    damage(Storage(), root, shard_of(bad), lambda data: flip(data, len(data) // 3))
    wanted = pa.table({"track_id": ["b", "c", "d"], "checksum": ["s-b", "s-c", "s-d"]})
    found = adopt_embeddings(Storage(), root, reader.index, wanted)
    assert found.rows["track_id"].to_pylist() == ["b"]
    assert found.rows.schema == lost.schema
    ((name, reason),) = found.refused
    assert name == shard_of(bad)
    assert "damaged" in reason


def test_a_track_is_done_for_the_states_it_was_read_from(root: str) -> None:
    wanted = pa.table({"track_id": ["a", "b", "c"], "checksum": ["s-a", "new-b", "s-c"]})
    index = publish(root, write(root, ok("a"), ok("b"))).index
    assert is_embedded(wanted, index).tolist() == [True, False, False]
    assert is_embedded(wanted, None).tolist() == [False] * 3


@pytest.mark.parametrize("how", ["flip", "gone", "other"])
def test_a_shard_that_is_not_what_the_index_says_is_refused(root: str, how: str) -> None:
    receipt = write(root, ok("a"))
    reader = publish(root, receipt)
    path = Path(root) / "shards" / shard_of(receipt)
    if how == "flip":
        damage(Storage(), root, path.name, lambda data: flip(data, 200))
    elif how == "gone":
        path.unlink()
    else:
        other = write(root, TrackVectors("a", "s-a", 42, vectors_of("x", 2)))
        path.write_bytes((path.parent / shard_of(other)).read_bytes())
    with pytest.raises(StoreError, match=r"(damaged|is gone|was replaced).*`wealy embed` makes it again"):
        reader.vectors("a")


def test_embedder_json_is_written_once_and_compared(tmp_path: Path, root: str) -> None:
    storage = Storage()
    SPEC.ensure(storage, str(tmp_path), "models/moved")  # where a model lies is not what it is
    assert list_embedders(storage, str(tmp_path))[SPEC.embedder_id]["model"] == "models/one"
    path = Path(root) / "embedder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kinds": None}))
    with pytest.raises(StoreError, match="does not describe embedder"):
        SPEC.ensure(storage, str(tmp_path), "models/one")
    other = EmbedderSpec("weights", EXTRACTOR_ID, None, SPEC.windows)
    assert other.embedder_id != SPEC.embedder_id
