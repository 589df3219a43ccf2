import io
import pickle

import numpy as np
import pytest

from wealy_ray.errors import StoreError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.matrix import MatrixScores, read_matrix
from wealy_ray.storage import Storage


def a_matrix(tmp_path, matrix, ids):
    np.save(tmp_path / "d.npy", matrix)
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    return Storage(), str(tmp_path / "d.npy"), str(tmp_path / "ids.txt")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_matrix_is_looked_up_by_id(tmp_path, dtype):
    matrix = np.random.default_rng(2).random((4, 4)).astype(dtype)
    matrix[1, 3] = np.inf
    ids, mapped = read_matrix(*a_matrix(tmp_path, matrix, ["d", "a", "x", "b"]))
    assert isinstance(mapped, np.memmap)
    collection = Collection.of(["a", "b", "c", "d"], ["1"] * 4, is_candidate=[True, True, True, False])
    scores = MatrixScores.of(collection, ids, mapped)
    dumped = pickle.dumps(scores)
    for system in (scores, pickle.loads(dumped)):
        assert system.missing.tolist() == [False, False, True, False]
        got = system.rows(np.arange(4)).numpy()
        for q, asking in enumerate("abcd"):
            for column, answering in enumerate("abc"):
                known = asking in ids and answering in ids
                expected = -matrix[ids.index(asking), ids.index(answering)] if known else -np.inf
                assert got[q, column] == np.float32(expected)
    assert str(tmp_path).encode() in dumped  # a reference, not a copy
    buffer = io.BytesIO()
    np.save(buffer, matrix)
    Storage().write("memory://matrix/d.npy", buffer.getvalue())
    elsewhere = read_matrix(Storage(), "memory://matrix/d.npy", str(tmp_path / "ids.txt"))
    assert elsewhere[0] == ids
    np.testing.assert_array_equal(elsewhere[1], matrix)


@pytest.mark.parametrize(
    ("matrix", "ids", "message"),
    [
        (np.zeros((2, 3)), ["a", "b"], r"is float64 \[2, 3\]; it must be a square"),
        (np.zeros((2, 2), int), ["a", "b"], "must be a square of floating-point"),
        (np.zeros((2, 2)), ["a"], "1 ids for a matrix of 2 rows"),
        (np.zeros((2, 2)), ["a", "a"], "id 'a' stands twice"),
        (np.array([[object()]]), ["a"], "is no .npy matrix of numbers"),
    ],
)
def test_a_bad_matrix_is_refused(tmp_path, matrix, ids, message):
    with pytest.raises(StoreError, match=message):
        read_matrix(*a_matrix(tmp_path, matrix, ids))


def test_an_archive_is_no_matrix(tmp_path):
    np.savez(tmp_path / "d.npz", d=np.zeros((2, 2)))
    (tmp_path / "ids.txt").write_text("a\nb\n")
    with pytest.raises(StoreError, match=r"d\.npz is an archive of several arrays"):
        read_matrix(Storage(), str(tmp_path / "d.npz"), str(tmp_path / "ids.txt"))


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e39])
def test_what_is_no_distance_is_named(value):
    matrix = np.zeros((600, 600))
    matrix[[3, 500], 7] = value
    collection = Collection.of(["t3"], ["c"])
    with pytest.raises(
        StoreError, match="NaN, -inf or numbers beyond float32 in 2 rows: 't3', 't500'; compute"
    ):
        MatrixScores.of(collection, [f"t{i}" for i in range(600)], matrix)
