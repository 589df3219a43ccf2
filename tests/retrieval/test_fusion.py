import pickle

import numpy as np
import pytest
import torch

from tests.retrieval import slow
from wealy_ray.errors import ConfigError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.evaluation import evaluate
from wealy_ray.retrieval.fusion import (
    LearnedFusion,
    RankFusion,
    WeightedScores,
    choose_weight,
    fit_fusion,
)
from wealy_ray.retrieval.metrics import mean_ap
from wealy_ray.retrieval.scores import VectorScores, hide_missing

SIZE = 57


class Table:
    """Scores that are given."""

    def __init__(self, collection, matrix, missing=()):
        self.matrix, self.candidates = matrix.astype(np.float32), collection.candidates
        self.missing = np.isin(np.arange(len(collection)), list(missing))

    def rows(self, queries, device=None):  # noqa: ARG002
        out = torch.from_numpy(self.matrix[queries][:, self.candidates])
        hide_missing(out, self.missing, queries, self.candidates)
        return out


@pytest.fixture
def collection():
    rng = np.random.default_rng(1)
    return Collection.of(
        [f"t{i:03d}" for i in range(SIZE)],
        [f"c{c}" for c in rng.integers(0, 12, SIZE)],
        is_candidate=rng.random(SIZE) < 0.8,
    )


@pytest.fixture
def systems(collection):
    rng = np.random.default_rng(2)
    a = rng.integers(-4, 5, (SIZE, SIZE)) / 2
    b = 10 + 100 * rng.random((SIZE, SIZE))
    return Table(collection, a, missing=[3, 4, 30]), Table(collection, b, missing=[4, 9])


def slow_part(row, own, normalise):
    """Distances as the row's scores say, normalised; the worst where there is none."""
    scored = [j for j in range(len(row)) if row[j] > -np.inf and j != own]
    if not scored:
        return [0.0] * len(row)
    distances = [-float(row[j]) for j in scored]
    low, high = min(distances), max(distances)
    mean = sum(distances) / len(distances)
    deviation = (sum((d - mean) ** 2 for d in distances) / len(distances)) ** 0.5
    origin, spread = {"none": (0, 1), "z_score": (mean, deviation), "min_max": (low, high - low)}[normalise]
    filled = [-float(x) if x > -np.inf else high for x in row]
    return [(d - origin) / spread if spread > 0 else 0.0 for d in filled]


@pytest.mark.parametrize("normalise", ["none", "z_score", "min_max"])
def test_weighted_scores_equal_loops(collection, systems, normalise):
    a, b = systems
    fused = WeightedScores(a, b, collection.column_of, 1.5, normalise)
    everyone = np.arange(SIZE)
    got = fused.rows(everyone).numpy()
    assert got.dtype == np.float32
    a_rows, b_rows = a.rows(everyone).numpy(), b.rows(everyone).numpy()
    for q in everyone:
        own = collection.column_of[q]
        d_a, d_b = slow_part(a_rows[q], own, normalise), slow_part(b_rows[q], own, normalise)
        for j in range(len(collection.candidates)):
            if a_rows[q, j] == b_rows[q, j] == -np.inf:
                assert got[q, j] == -np.inf
            elif j != own:
                np.testing.assert_allclose(got[q, j], -(d_a[j] + 1.5 * d_b[j]), rtol=2e-6, atol=2e-6)
    assert np.flatnonzero(fused.missing).tolist() == [4]
    assert np.isneginf(got[4]).all()


def test_a_flat_row_contributes_nothing(collection, systems):
    _, b = systems
    flat = Table(collection, np.full((SIZE, SIZE), 0.1))
    queries = np.array([0, 1])
    for normalise in ("z_score", "min_max"):
        fused = WeightedScores(b, flat, collection.column_of, 7.0, normalise).rows(queries)
        ours = WeightedScores(b, b, collection.column_of, 0.0, normalise).rows(queries)
        scored = torch.isfinite(ours)
        assert scored.sum() > SIZE
        assert torch.equal(fused[scored], ours[scored])


def test_rank_fusion_equals_loops(collection, systems):
    a, b = systems
    everyone = np.arange(SIZE)
    got = RankFusion(a, b, collection.column_of, k=7).rows(everyone).numpy()
    tables = [x.rows(everyone).numpy() for x in (a, b)]
    for q in everyone:
        own = collection.column_of[q]
        expected = np.zeros(len(collection.candidates))
        for table in tables:
            order = [j for j in slow.ranking(table[q], own) if table[q, j] > -np.inf]
            for j in range(len(expected)):
                rank = order.index(j) + 1 if j in order else len(order)
                expected[j] += 1 / (7 + rank) if order else 0
        expected[(tables[0][q] == -np.inf) & (tables[1][q] == -np.inf)] = -np.inf
        if own >= 0:
            expected[own] = -np.inf
        np.testing.assert_array_equal(got[q], expected.astype(np.float32))


def fusions(a, b, column_of):
    yield from (WeightedScores(a, b, column_of, 0.7, n) for n in ("none", "z_score", "min_max"))
    yield RankFusion(a, b, column_of)
    yield LearnedFusion(a, b, column_of, 2.0, 0.3)


def test_a_row_has_the_same_bits_in_any_block_and_after_pickling():
    rng = np.random.default_rng(3)
    size = 5000  # enough columns that torch shares a sum among threads if it may
    collection = Collection.of([f"{i:05d}" for i in range(size)], ["c"] * size)
    a, b = (
        VectorScores.cosine(
            collection, rng.standard_normal((size, 8)).astype(np.float32), rng.random(size) < 0.01
        )
        for _ in range(2)
    )
    queries = rng.choice(size, 37, replace=False)
    before = torch.get_num_threads()
    for fused in fusions(a, b, collection.column_of):
        whole = fused.rows(queries)
        try:
            torch.set_num_threads(1)
            alone = pickle.loads(pickle.dumps(fused)).rows(queries[[20]])
        finally:
            torch.set_num_threads(before)
        assert torch.equal(alone[0], whole[20])
        assert torch.equal(fused.rows(queries[::-1].copy()).flip(0), whole)
        assert fused.rows(queries[:0]).shape == (0, size)


@pytest.mark.parametrize("normalise", ["none", "z_score", "min_max"])
def test_the_curve_is_what_evaluate_says(collection, systems, normalise):
    a, b = systems
    weights = [0.5, 0.0, 2.0]
    curve, best = choose_weight(a, b, collection, weights, normalise)
    expected = [
        mean_ap(
            [evaluate(WeightedScores(a, b, collection.column_of, w, normalise), collection, views=["all"])]
        )
        for w in weights
    ]
    assert [w for w, _ in curve] == weights
    np.testing.assert_allclose([value for _, value in curve], expected, rtol=1e-12)
    assert best == weights[int(np.argmax(expected))]


def test_of_equally_good_weights_the_smallest_is_chosen(collection, systems):
    a, _ = systems
    curve, best = choose_weight(a, a, collection, [3.0, 1.0, 2.0])
    assert len({value for _, value in curve}) == 1
    assert best == 1.0


def test_the_fit_finds_the_system_that_knows(collection):
    rng = np.random.default_rng(5)
    same = collection.cliques[:, None] == collection.cliques[None]
    knows = Table(collection, same + 0.5 * rng.standard_normal((SIZE, SIZE)), missing=[2])
    guesses = Table(collection, 1000 * rng.standard_normal((SIZE, SIZE)))
    fused = fit_fusion(knows, guesses, collection, num_negatives=20)
    assert fused.weight_a > 1
    assert fused.weight_a > 1000 * abs(fused.weight_b)
    again = fit_fusion(knows, guesses, collection, num_negatives=20)
    assert (fused.weight_a, fused.weight_b) == (again.weight_a, again.weight_b)
    rows = fused.rows(np.array([5])).numpy()[0]
    a, b = (x.rows(np.array([5])).numpy()[0] for x in (knows, guesses))
    scored = np.isfinite(a)
    np.testing.assert_allclose(
        rows[scored], fused.weight_a * a[scored] + fused.weight_b * b[scored], rtol=1e-5, atol=1e-6
    )


def test_the_fit_equals_one_over_all_pairs_written_by_hand(collection):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(6)
    same = collection.cliques[:, None] == collection.cliques[None]
    a = Table(collection, same + rng.standard_normal((SIZE, SIZE)))
    b = Table(collection, 5 * same + 10 * rng.standard_normal((SIZE, SIZE)))
    x, y = [], []
    for q in collection.queries:
        for j in collection.candidates:
            if j != q:
                x.append([a.matrix[q, j], b.matrix[q, j]])
                y.append(same[q, j])
    x = np.array(x, np.float64)
    model = LogisticRegression(max_iter=1000).fit((x - x.mean(0)) / x.std(0), y)
    fused = fit_fusion(a, b, collection, num_negatives=SIZE)
    np.testing.assert_allclose([fused.weight_a, fused.weight_b], model.coef_[0] / x.std(0), rtol=1e-3)


def test_what_cannot_be_fused_is_refused(collection, systems):
    a, b = systems
    with pytest.raises(ConfigError, match="unknown normalisation 'l2'; there are none, z_score, min_max"):
        WeightedScores(a, b, collection.column_of, 1.0, "l2")
    with pytest.raises(ConfigError, match="no fusion weights"):
        choose_weight(a, b, collection, [])
    strangers = Collection.of(["x", "y"], ["c", "d"])
    with pytest.raises(ConfigError, match="no validation track has a relevant candidate"):
        choose_weight(a, b, strangers, [1.0])
    with pytest.raises(ConfigError, match="there are 0 and 0"):
        fit_fusion(a, b, strangers)
