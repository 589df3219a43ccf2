import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from wealy_ray.errors import ConfigError, StoreError
from wealy_ray.retrieval import imports, multi_vector, stored_sets
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.imports import PackedVectors, open_embeddings, write_embeddings
from wealy_ray.retrieval.multi_vector import MultiVectorScores, PackedSets
from wealy_ray.retrieval.stored_sets import StoredSets
from wealy_ray.storage import Storage, join

RULE = r"([^/]+)\.pt$"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tensors = {"b/x2": torch.randn(3, 5), "a/x10": torch.randn(1, 5), "a/x1": torch.randn(5).half()}
    for name, tensor in tensors.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(tensor, tmp_path / f"{name}.pt")
    (tmp_path / "README.txt").write_text("no tensor")
    return tmp_path, tensors


def packed_of(uri, rule=None, storage=None):
    return PackedVectors.of(open_embeddings(storage or Storage(), str(uri), rule))


@pytest.mark.parametrize("rule", [RULE, {"b/x2.pt": "x2", "a/x10.pt": "x10", "a/x1.pt": "x1"}])
def test_a_folder_of_tensors_is_packed_in_the_order_of_ids(folder, rule, tmp_path_factory):
    path, tensors = folder
    if isinstance(rule, dict):
        mapping = tmp_path_factory.mktemp("rule") / "ids.json"
        mapping.write_text(json.dumps(rule))
        rule = str(mapping)
    packed = packed_of(f"{path}/", rule)
    assert packed.track_ids.tolist() == ["x1", "x10", "x2"]
    assert packed.offsets.tolist() == [0, 1, 2, 5]
    assert packed.vectors.dtype == np.float32
    expected = [tensors[n].float().reshape(-1, 5) for n in ("a/x1", "a/x10", "b/x2")]
    np.testing.assert_array_equal(packed.vectors, torch.cat(expected).numpy())


def test_tensors_in_memory_storage_are_read_and_scored(folder):
    path, _ = folder
    storage = Storage()
    for name in ("b/x2", "a/x10", "a/x1"):
        storage.write(f"memory://clews/{name}.pt", (path / f"{name}.pt").read_bytes())
    packed = packed_of("memory://clews", RULE, storage)
    collection = Collection.of(["x1", "x2", "x3"], ["c", "c", "c"])
    sets = PackedSets.of_collection(collection, packed.track_ids, packed.vectors, packed.offsets)
    scores = MultiVectorScores(sets, collection.candidates, "sqeuclidean")
    x1, x2 = packed.vectors[:1].astype(np.float64), packed.vectors[2:].astype(np.float64)
    expected = min(((x1[0] - y) ** 2).sum() / 5 for y in x2)
    np.testing.assert_allclose(float(scores.rows(np.array([0]))[0, 1]), -expected, rtol=1e-5)
    assert scores.missing.tolist() == [False, False, True]


def test_a_path_without_a_file_is_warned_about(folder, caplog, tmp_path_factory):
    mapping = tmp_path_factory.mktemp("rule") / "ids.json"
    rule = {"b/x2.pt": "x2", "a/x10.pt": "x10", "a/x1.pt": "x1", "a/gone.pt": "gone"}
    mapping.write_text(json.dumps(rule))
    with caplog.at_level(logging.WARNING):
        assert len(packed_of(folder[0], str(mapping)).track_ids) == 3
    assert "1 of 4 paths have no file: 'a/gone.pt'" in caplog.text


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (r"b/(\w+)\.pt", r"gives no track id for 2 files: 'a/x1.pt', 'a/x10.pt'"),
        (r"(x\d)", r"gives track id 'x1' to 2 files: 'a/x1.pt', 'a/x10.pt'"),
        (r"x\d", "has 0 groups"),
        (r"(x", "is no regular expression"),
        (None, "id_from_path must say how"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(folder, rule, message):
    with pytest.raises(ConfigError, match=message):
        packed_of(folder[0], rule)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ('["a"]', "one JSON object"), ('{"b/x2.pt": "x2"}', "for 2 files")],
)
def test_a_mapping_that_does_not_fit_is_refused(folder, text, message, tmp_path_factory):
    mapping = tmp_path_factory.mktemp("rule") / "ids.json"
    mapping.write_text(text)
    with pytest.raises(ConfigError, match=message):
        packed_of(folder[0], str(mapping))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2, 3, 5), r"bad.pt is \[2, 3, 5\]; it must be"),
        (torch.zeros(0, 5), r"bad.pt is \[0, 5\]"),
        (torch.zeros(2, 4), "have 4 dimensions|have 5 dimensions"),
        (torch.tensor([1.0, 2, 3, torch.nan, 5]), "1 tracks hold NaN or infinity: 'bad'"),
        ({"a": 1}, "no dense tensor of floating-point"),
        (torch.zeros(2, 5, dtype=torch.long), "no dense tensor of floating-point"),
        (torch.eye(5).to_sparse(), "no dense tensor of floating-point"),
        (b"PK\x03\x04 cut", "cannot be read as a tensor"),
    ],
)
def test_a_bad_tensor_is_named(folder, content, message):
    path, _ = folder
    if isinstance(content, bytes):
        (path / "bad.pt").write_bytes(content)
    else:
        torch.save(content, path / "bad.pt")
    with pytest.raises(StoreError, match=message):
        packed_of(path, RULE)


def test_a_folder_of_neither_or_both_is_refused(folder, tmp_path_factory):
    with pytest.raises(StoreError, match=r"neither a Parquet file nor \.pt files"):
        packed_of(tmp_path_factory.mktemp("empty"), RULE)
    (folder[0] / "z.parquet").write_bytes(b"")
    with pytest.raises(StoreError, match=r"both \.pt and \.parquet"):
        packed_of(folder[0], RULE)


def some_vectors(rng):
    vectors = rng.standard_normal((6, 4)).astype(np.float32)
    return PackedVectors(np.array(["a", "b", "c"], object), vectors, np.array([0, 1, 4, 6]))


def assert_equal(one, other):
    for name in ("track_ids", "vectors", "offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("block_rows", [1, 2, 100])
def test_embeddings_come_back_from_parquet(tmp_path, monkeypatch, block_rows):
    monkeypatch.setattr(imports, "BLOCK_ROWS", block_rows)
    rng = np.random.default_rng(1)
    packed = some_vectors(rng)
    uri = join(str(tmp_path), "z.parquet")
    write_embeddings(Storage(), uri, packed, {"model": "m1", "note": "für"})
    schema = pq.read_schema(uri)
    assert schema.names == ["track_id", "window", "z"]
    assert schema.field("z").type == pa.list_(pa.float32(), 4)
    source = open_embeddings(Storage(), uri)
    assert source.metadata == {"model": "m1", "note": "für"}
    assert source.is_ordered
    assert source.num_bytes == 6 * 4 * 4
    assert_equal(PackedVectors.of(source), packed)
    # another's file: rows in any order, in several row groups
    table = pq.read_table(uri).take([3, 0, 5, 1, 4, 2])
    pq.write_table(table, uri, row_group_size=2)
    source = open_embeddings(Storage(), uri)
    assert not source.is_ordered
    assert_equal(PackedVectors.of(source), packed)
    # a folder, with a track that stands in two files
    folder = tmp_path / "several"
    folder.mkdir()
    table = table.sort_by([("track_id", "ascending"), ("window", "ascending")])
    pq.write_table(table.slice(0, 3), folder / "0.parquet")
    pq.write_table(table.slice(3), folder / "1.parquet")
    assert_equal(packed_of(folder), packed)


def test_files_of_other_widths_are_refused(tmp_path):
    for dim in (2, 3):
        packed = PackedVectors(np.array([f"t{dim}"], object), np.ones((1, dim), np.float32), np.array([0, 1]))
        write_embeddings(Storage(), str(tmp_path / f"{dim}.parquet"), packed, {})
    with pytest.raises(StoreError, match=r"3\.parquet have 3 dimensions, those in .*2\.parquet have 2"):
        packed_of(tmp_path)


@pytest.mark.parametrize("reduction", ["min", "mean_min", "bpwr-2"])
def test_streamed_tiles_score_as_packed_vectors(tmp_path, monkeypatch, reduction):
    for module in (multi_vector, stored_sets):
        monkeypatch.setattr(module, "TILE_VECTORS", 16)
    rng = np.random.default_rng(3)
    sizes = [3, 1, 20, 5, 8, 2, 9, 1, 7, 4]
    ids = np.array([f"t{i:02d}" for i in range(10)], object)
    vectors = rng.standard_normal((sum(sizes), 6)).astype(np.float32)
    packed = PackedVectors(ids, vectors, np.cumsum([0, *sizes]))
    uri = str(tmp_path / "z.parquet")
    write_embeddings(Storage(), uri, packed, {})
    # not all of the file's tracks, one that it lacks, one that may not answer
    mine = [*ids[1:], "t99", "a"]
    collection = Collection.of(mine, ["c"] * 11, is_candidate=[t != "t04" for t in mine])
    held = PackedSets.of_collection(collection, packed.track_ids, packed.vectors, packed.offsets)
    stored = StoredSets.write(Storage(), str(tmp_path / "tiles"), collection, open_embeddings(Storage(), uri))
    assert len(list(stored.tiles())) > 2
    queries = np.arange(11)
    expected = MultiVectorScores(held, collection.candidates, "cosine", reduction).rows(queries)
    assert torch.equal(
        MultiVectorScores(stored, collection.candidates, "cosine", reduction).rows(queries), expected
    )
    # found again, without its source
    again = StoredSets.write(Storage(), str(tmp_path / "tiles"), collection, None)
    assert torch.equal(
        MultiVectorScores(again, collection.candidates, "cosine", reduction).rows(queries), expected
    )
    (tmp_path / "tiles" / "000001.f32").write_bytes(b"1234")
    with pytest.raises(StoreError, match=r"a tile in .* is damaged; remove the folder"):
        MultiVectorScores(again, collection.candidates).rows(queries)


def test_nan_leaves_no_tiles_behind(tmp_path):
    packed = some_vectors(np.random.default_rng(2))
    packed.vectors[2, 1] = np.nan
    uri = str(tmp_path / "z.parquet")
    write_embeddings(Storage(), uri, packed, {})
    collection = Collection.of(["a", "b", "c"], ["x"] * 3)
    with pytest.raises(StoreError, match="1 tracks hold NaN or infinity: 'b'"):
        StoredSets.write(Storage(), str(tmp_path / "tiles"), collection, open_embeddings(Storage(), uri))
    assert not (tmp_path / "tiles" / "tiles.json").exists()


def rows(**changes):
    z = pa.array([[1.0, 2], [3, 4]], pa.list_(pa.float32(), 2))
    return {"track_id": ["a", "a"], "window": [0, 1], "z": z} | changes


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"track_id": ["a"], "window": [0]}, "no column 'z'"),
        (rows(z=[[1.0], [2.0]]), "must be fixed_size_list<float32>"),
        (rows(track_id=["a", None]), "column 'track_id' of .* has 1 missing"),
        (rows(window=[3, 3]), "window 3 of track 'a' stands twice"),
        (
            rows(z=pa.array([[1.0, 2], [None, 4]], pa.list_(pa.float32(), 2))),
            "1 tracks hold NaN or infinity: 'a'",
        ),
    ],
)
def test_bad_embeddings_are_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "z.parquet")
    with pytest.raises(StoreError, match=message):
        packed_of(tmp_path / "z.parquet")


def test_no_parquet_is_refused(tmp_path):
    (tmp_path / "z.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(StoreError, match="cannot be read as Parquet"):
        packed_of(tmp_path / "z.parquet")
