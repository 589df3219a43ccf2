import pickle

import numpy as np
import pytest
import torch

from wealy_ray.errors import ConfigError
from wealy_ray.retrieval import multi_vector
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.evaluation import evaluate
from wealy_ray.retrieval.kernels import best_pairs, nearest
from wealy_ray.retrieval.multi_vector import MultiVectorScores, PackedSets
from wealy_ray.retrieval.ranking import rank_positives

REDUCTIONS = ["min", "mean_min", "bpwr-1", "bpwr-3", "bpwr-10"]
DIM = 12


def pack(sets):
    return np.concatenate(sets), np.cumsum([0, *map(len, sets)], dtype=np.int64)


def slow_distance(x, y, distance):
    x, y = x.astype(np.float64), y.astype(np.float64)
    if distance == "cosine":
        return 1 - x @ y / (np.sqrt(x @ x) * np.sqrt(y @ y))
    return ((x - y) ** 2).sum() / len(x)


def slow_reduction(table, reduction):
    if reduction == "min":
        return min(min(row) for row in table)
    if reduction == "mean_min":
        return sum(min(row) for row in table) / len(table)
    pairs = sorted((d, s, t) for s, row in enumerate(table) for t, d in enumerate(row))
    taken = []
    while pairs and len(taken) < int(reduction.removeprefix("bpwr-")):
        d, s, t = pairs[0]
        taken.append(d)
        pairs = [p for p in pairs if p[1] != s and p[2] != t]
    return sum(taken) / len(taken)


def a_system(rng, sizes, **more):
    sets = {f"t{i:03d}": rng.standard_normal((size, DIM)).astype(np.float32) for i, size in enumerate(sizes)}
    collection = Collection.of(list(sets), [f"c{i % 4}" for i in range(len(sizes))], **more)
    return sets, collection


def system_of(sets, collection, shuffled, **choice):
    ids = shuffled.permutation([t for t in sets if len(sets[t])])
    packed = PackedSets.of_collection(collection, ids, *pack([sets[t] for t in ids]))
    return MultiVectorScores(packed, collection.candidates, **choice)


@pytest.mark.parametrize("distance", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scores_equal_loops_over_pairs(reduction, distance, monkeypatch):
    monkeypatch.setattr(multi_vector, "TILE_VECTORS", 32)  # several tiles, and one track above a tile
    rng = np.random.default_rng(4)
    sizes = [1, 5, 17, 1, 0, 40, 3, 8, 2, 16, 0, 33, 1, 7]
    sets, collection = a_system(rng, sizes, is_candidate=[i != 7 for i in range(len(sizes))])
    system = system_of(sets, collection, rng, distance=distance, reduction=reduction)
    assert len(list(system.sets.tiles())) > 3
    got = system.rows(np.arange(len(sizes)))
    assert got.dtype == torch.float32
    assert np.flatnonzero(system.missing).tolist() == [4, 10]
    for q, x in enumerate(sets.values()):
        for column, c in enumerate(collection.candidates):
            y = sets[collection.track_ids[c]]
            if not len(x) or not len(y):
                assert got[q, column] == -np.inf
                continue
            table = [[slow_distance(u, v, distance) for v in y] for u in x]
            np.testing.assert_allclose(
                float(got[q, column]), -slow_reduction(table, reduction), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_greedy_choice_breaks_ties_as_said(reduction):
    """Whole numbers, with many equal distances: what is left over depends on which of equals is taken."""
    rng = np.random.default_rng(8)
    for _ in range(200):
        sizes = rng.integers(1, 7, 5)
        offsets = np.cumsum([0, *sizes], dtype=np.int64)
        table = rng.integers(0, 4, (rng.integers(1, 7), offsets[-1])).astype(np.float32)
        out = np.empty(5, np.float32)
        if reduction.startswith("bpwr"):
            best_pairs(table, offsets, multi_vector.num_pairs(reduction), out)
        else:
            nearest(table, offsets, reduction == "mean_min", out)
        for c in range(5):
            part = table[:, offsets[c] : offsets[c + 1]].tolist()
            assert out[c] == np.float32(slow_reduction(part, reduction))


@pytest.mark.parametrize("distance", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("reduction", ["min", "mean_min", "bpwr-3"])
def test_a_row_has_the_same_bits_in_any_block_and_after_pickling(reduction, distance):
    rng = np.random.default_rng(5)
    sets, collection = a_system(rng, rng.integers(1, 90, 300))
    system = system_of(sets, collection, rng, distance=distance, reduction=reduction)
    assert len(list(system.sets.tiles())) == 2
    queries = np.array([3, 200, 7, 150, 12])
    whole = system.rows(queries)
    alone = pickle.loads(pickle.dumps(system)).rows(np.array([150]))
    assert torch.equal(alone[0], whole[3])


def test_a_score_does_not_depend_on_the_other_candidates():
    rng = np.random.default_rng(6)
    sets, everyone = a_system(rng, rng.integers(1, 30, 60))
    few = Collection.of(everyone.track_ids, ["c"] * 60, is_candidate=np.arange(60) % 3 == 2)
    queries = np.arange(0, 60, 7)
    for reduction in ("min", "mean_min", "bpwr-10"):
        all_rows = system_of(sets, everyone, rng, reduction=reduction).rows(queries)
        few_rows = system_of(sets, few, rng, reduction=reduction).rows(queries)
        assert torch.equal(all_rows[:, few.candidates], few_rows)


def test_one_vector_per_track_ranks_as_its_cosine():
    rng = np.random.default_rng(9)
    sets, collection = a_system(rng, [1] * 40)
    system = system_of(sets, collection, rng, reduction="mean_min")
    matrix = np.concatenate(list(sets.values()))
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    queries = collection.queries
    ranks = rank_positives(
        torch.from_numpy(matrix @ matrix.T)[queries],
        collection.positives(queries),
        collection.column_of[queries],
    )
    found = evaluate(system, collection, views=["all"])
    assert np.concatenate(found["ranks"].to_pylist()).tolist() == ranks.ranks.tolist()


def test_tiles_hold_whole_candidates_in_order(monkeypatch):
    monkeypatch.setattr(multi_vector, "TILE_VECTORS", 4)
    vectors = np.arange(12, dtype=np.float32)[:, None]
    sets = PackedSets(vectors, np.array([6, 0, 5, 1, 11]), np.array([2, 1, 0, 5, 1]), np.arange(5))
    tiles = list(sets.tiles())
    assert [t.vectors[:, 0].tolist() for t in tiles] == [[6, 7, 0], [1, 2, 3, 4, 5], [11]]
    assert [np.diff(t.offsets).tolist() for t in tiles] == [[2, 1, 0], [5], [1]]
    none = np.zeros(0, np.int64)
    assert list(PackedSets(vectors, none, none, none).tiles()) == []


def test_candidates_without_any_vector_have_no_score():
    sets, collection = a_system(np.random.default_rng(2), [3, 0, 0], is_candidate=[False, True, True])
    system = system_of(sets, collection, np.random.default_rng(0))
    assert torch.equal(system.rows(np.arange(3)), torch.full((3, 2), -torch.inf))


def test_what_is_wrong_is_refused():
    rng = np.random.default_rng(3)
    sets, collection = a_system(rng, [2, 3, 1])
    with pytest.raises(ConfigError, match="there are min, mean_min and bpwr-K"):
        system_of(sets, collection, rng, reduction="bpwr-0")
    with pytest.raises(ConfigError, match="there are cosine, sqeuclidean"):
        system_of(sets, collection, rng, distance="l1")
