from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.retrieval import slow
from wealy_ray.errors import ManifestError, StoreError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.evaluation import evaluate, evaluate_tile, num_tiles
from wealy_ray.retrieval.metrics import mean_ap, summarise
from wealy_ray.retrieval.scores import VectorScores

DATASETS = Path(__file__).parents[2].parent / "shared" / "datasets"


def a_collection(rng, size, num_cliques, **more):
    cliques = [f"c{c}" if c >= 0 else None for c in rng.integers(-1, num_cliques, size)]
    languages = rng.choice(["en", "es", ""], size).tolist()
    return Collection.of([f"t{i:05d}" for i in range(size)], cliques, languages=languages, **more)


class Table:
    """Scores that are given."""

    def __init__(self, collection, matrix):
        self.matrix, self.collection = matrix, collection
        self.missing = np.zeros(len(collection), bool)

    def rows(self, queries, device=None):  # noqa: ARG002
        import torch

        return torch.from_numpy(self.matrix[queries][:, self.collection.candidates])


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 70), num_cliques=st.sampled_from([1, 3, 30]))
def test_metrics_equal_brute_force_with_many_ties(seed, size, num_cliques):
    rng = np.random.default_rng(seed)
    partly = rng.random() < 0.5
    collection = a_collection(
        rng,
        size,
        num_cliques,
        is_query=rng.random(size) < 0.7 if partly else None,
        is_candidate=rng.random(size) < 0.7 if partly else None,
    )
    vectors = rng.integers(-1, 2, (size, 3)).astype(np.float32)
    matrix = vectors @ vectors.T
    found = evaluate(Table(collection, matrix), collection).to_pylist()
    seen = set()
    for row in found:
        q = int(np.flatnonzero(collection.track_ids == row["track_id"])[0])
        seen.add((row["track_id"], row["view"]))
        language = collection.languages[q]
        allowed = [
            j
            for j in collection.candidates
            if j != q
            and (
                row["view"] == "all"
                or (row["view"] == "within_language" and collection.languages[j] == language)
                or (row["view"] == "cross_language" and collection.languages[j] not in ("", language))
            )
        ]
        relevant = [k for k, j in enumerate(allowed) if collection.cliques[j] == collection.cliques[q]]
        scores = matrix[q, allowed]
        ranks = slow.ranks(scores, -1, relevant)
        assert row["ranks"] == ranks
        assert row["num_candidates"] == len(allowed)
        assert row["ap"] == pytest.approx(slow.average_precision(ranks), abs=1e-12)
        best = slow.extreme_ranks(scores, -1, relevant, best=True)
        worst = slow.extreme_ranks(scores, -1, relevant, best=False)
        assert row["ap_optimistic"] == pytest.approx(slow.average_precision(best), abs=1e-12)
        assert row["ap_pessimistic"] == pytest.approx(slow.average_precision(worst), abs=1e-12)
        assert row["nar"] == pytest.approx(slow.nar(ranks, len(allowed)), abs=1e-12)
        assert row["p_10"] == pytest.approx(sum(r <= 10 for r in ranks) / 10, abs=1e-12)
        assert (row["hit_1"], row["hit_10"]) == (ranks[0] == 1, ranks[0] <= 10)
        assert (row["first_rank"], row["rr"]) == (ranks[0], 1 / ranks[0])
    for q in range(size):
        others = [
            j for j in collection.candidates if j != q and collection.cliques[j] == collection.cliques[q] >= 0
        ]
        asks = bool(collection.is_query[q] and others)
        assert ((collection.track_ids[q], "all") in seen) == asks


def test_order_of_the_tracks_does_not_matter():
    rng = np.random.default_rng(1)
    ids = [f"t{i}" for i in range(40)]
    cliques = [f"c{i % 7}" for i in range(40)]
    vectors = dict(zip(ids, rng.normal(size=(40, 8)).astype(np.float32), strict=True))
    tables = []
    for order in (np.arange(40), rng.permutation(40)):
        collection = Collection.of([ids[i] for i in order], [cliques[i] for i in order])
        matrix = np.stack([vectors[i] for i in collection.track_ids])
        tables.append(evaluate(VectorScores.cosine(collection, matrix, np.zeros(40, bool)), collection))
    assert tables[0].equals(tables[1])


def test_tiles_do_not_depend_on_one_another():
    rng = np.random.default_rng(2)
    collection = a_collection(rng, 900, 100)
    scores = VectorScores.cosine(
        collection, rng.normal(size=(900, 64)).astype(np.float32), np.zeros(900, bool)
    )
    whole = evaluate(scores, collection, num_threads=2)
    assert num_tiles(collection) > 2
    last = num_tiles(collection) - 1
    alone = evaluate_tile(scores, collection, last)
    ids = set(alone["track_id"].to_pylist())
    expected = [row for row in whole.to_pylist() if row["track_id"] in ids]
    assert alone.to_pylist() == expected
    one_row = scores.rows(collection.queries[5:6])
    assert np.array_equal(one_row[0], scores.rows(collection.queries[:7])[5])


def test_what_a_system_knows_nothing_of_ranks_last():
    collection = Collection.of(["a", "b", "c", "d"], ["x", "x", "y", "y"])
    vectors = np.array([[1, 0], [0, 0], [-1, 0], [-1, 0.1]], np.float32)
    missing = np.array([False, True, False, False])
    found = evaluate(VectorScores.cosine(collection, vectors, missing), collection)
    # `b` is behind both others although these are opposite to `a`; as a query it finds nothing before the end
    assert found["first_rank"].to_pylist() == [3, 3, 1, 1]
    assert found["ap_optimistic"].to_pylist() == found["ap"].to_pylist()


def test_zero_vectors_are_kept_and_nan_is_refused():
    collection = Collection.of(["a", "b", "c"], ["x", "x", None])
    vectors = np.array([[1, 0], [0, 0], [-1, 0]], np.float32)
    none = np.zeros(3, bool)
    found = evaluate(VectorScores.cosine(collection, vectors, none), collection)
    assert found["first_rank"].to_pylist() == [1, 1]
    vectors[2, 1] = np.nan
    with pytest.raises(StoreError, match=r"1 tracks hold NaN or infinity: 'c'"):
        VectorScores.cosine(collection, vectors, none)


def test_where_nobody_has_a_vector_all_are_missing():
    collection = Collection.of(["a", "b", "c"], ["x", "x", None])
    scores = VectorScores.cosine(collection, np.zeros((3, 0), np.float32), np.ones(3, bool))
    found = evaluate(scores, collection)
    assert found["first_rank"].to_pylist() == [2, 2]


def test_a_doubled_id_is_refused():
    with pytest.raises(ManifestError, match="'a' stands twice"):
        Collection.of(["a", "b", "a"], [None, None, None])


def test_the_bootstrap_draws_cliques_not_queries():
    """Two cliques of which one is always right: queries are many, independent facts are two."""
    cliques = ["x"] * 50 + ["y"] * 50
    collection = Collection.of([f"t{i:03d}" for i in range(100)], cliques)
    matrix = np.zeros((100, 100), np.float32)
    matrix[:50, :50] = 1  # `x` finds itself, `y` finds `x` first
    matrix[50:, :50] = 1
    found = summarise(evaluate(Table(collection, matrix), collection, views=["all"]))
    assert found["map"]["ci"] < 0.2
    assert found["map"]["high"] == 1.0
    assert found["map"]["high"] - found["map"]["low"] > 0.5


def test_average_precision_equals_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    collection = a_collection(rng, 120, 10)
    matrix = rng.normal(size=(120, 120)).astype(np.float32)
    found = evaluate(Table(collection, matrix), collection, views=["all"])
    for row in found.to_pylist():
        q = int(np.flatnonzero(collection.track_ids == row["track_id"])[0])
        others = np.arange(120) != q
        expected = metrics.average_precision_score(
            (collection.cliques == collection.cliques[q])[others], matrix[q][others]
        )
        assert row["ap"] == pytest.approx(expected, abs=1e-12)


def test_equal_to_ranx():
    ranx = pytest.importorskip("ranx")
    rng = np.random.default_rng(4)
    collection = a_collection(rng, 60, 8)
    matrix = rng.permutation(3600).reshape(60, 60).astype(np.float32)  # ranx has no rule for ties
    found = evaluate(Table(collection, matrix), collection, views=["all"])
    qrels, run = {}, {}
    for q in collection.queries:
        name = collection.track_ids[q]
        qrels[name] = {
            t: 1
            for j, t in enumerate(collection.track_ids)
            if j != q and collection.cliques[j] == collection.cliques[q]
        }
        run[name] = {t: float(matrix[q, j]) for j, t in enumerate(collection.track_ids) if j != q}
    theirs = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), ["map", "mrr", "precision@10", "hit_rate@10"])
    summary = summarise(found)
    ours = {"map": "map", "mrr": "mrr", "precision@10": "p_10", "hit_rate@10": "hit_10"}
    for their_name, our_name in ours.items():
        assert summary[our_name]["mean"] == pytest.approx(theirs[their_name], abs=1e-12)


def test_equal_to_pytorch_metric_learning():
    """With every neighbour asked for; with its default k it truncates, which is another metric."""
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    rng = np.random.default_rng(6)
    collection = a_collection(rng, 300, 40)
    vectors = rng.standard_normal((300, 16)).astype(np.float32)
    scores = VectorScores.cosine(collection, vectors, np.zeros(300, bool))
    calculator = AccuracyCalculator(
        include=("mean_average_precision", "mean_reciprocal_rank", "precision_at_1"),
        k=299,
        knn_func=CustomKNN(CosineSimilarity()),
        device=torch.device("cpu"),
    )
    # a clique of one has no place there either; tracks without a clique would be one large clique
    labels = np.where(collection.cliques < 0, 10_000 + np.arange(300), collection.cliques)
    theirs = calculator.get_accuracy(torch.from_numpy(vectors), torch.from_numpy(labels))
    ours = summarise(evaluate(scores, collection, views=["all"]))
    assert ours["map"]["mean"] == pytest.approx(theirs["mean_average_precision"], abs=1e-6)
    assert ours["mrr"]["mean"] == pytest.approx(theirs["mean_reciprocal_rank"], abs=1e-6)
    assert ours["hit_1"]["mean"] == pytest.approx(theirs["precision_at_1"], abs=1e-6)


@pytest.mark.skipif(not DATASETS.is_dir(), reason="the metadata files are not here")
def test_cliques_of_shs100k_test():
    """10,547 versions in their real cliques, synthetic vectors, against a sort of every row."""
    lines = (DATASETS / "SHS100K-TEST").read_text().split("\n")
    pairs = [line.split("\t") for line in lines if line.strip()]
    collection = Collection.of([f"{s}-{v}" for s, v in pairs], [s for s, _ in pairs])
    assert len(collection) == 10_547
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(len(collection.clique_names), 32))
    vectors = (centres[collection.cliques] + 1.0 * rng.normal(size=(len(collection), 32))).astype(np.float32)
    scores = VectorScores.cosine(collection, vectors, np.zeros(len(collection), bool))
    found = evaluate(scores, collection, views=["all"], num_threads=2)
    assert found.num_rows == len(collection.queries)
    expected = []
    for start in range(0, len(collection.queries), 256):
        queries = collection.queries[start : start + 256]
        block = scores.rows(queries).numpy()
        block[np.arange(len(queries)), queries] = -np.inf
        order = np.argsort(-block, axis=1, kind="stable")
        for i, q in enumerate(queries):
            hits = np.flatnonzero(collection.cliques[order[i]][:-1] == collection.cliques[q])
            expected.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
    assert np.abs(found["ap"].to_numpy() - np.array(expected)).max() < 1e-12
    assert 0.1 < mean_ap([found]) < 0.9
