"""Two systems over the same queries."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from wealy_ray.retrieval.metrics import NUM_RESAMPLES, map_gain


def rows(ap: np.ndarray, cliques: np.ndarray, order: np.ndarray) -> pa.Table:
    ids = [f"t{i:03d}" for i in range(len(ap))]
    columns = {"track_id": ids, "clique_id": [f"c{c}" for c in cliques], "ap": ap}
    return pa.table(columns).take(order)


def test_gain_against_a_slow_loop_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    cliques = np.repeat(np.arange(8), rng.integers(2, 6, 8))
    n = len(cliques)
    a, b = rng.random(n), rng.random(n)
    mean, low, high = map_gain(rows(a, cliques, rng.permutation(n)), rows(b, cliques, rng.permutation(n)), 3)
    draws = np.random.default_rng(3)
    slow = []
    for _ in range(NUM_RESAMPLES):
        drawn = draws.integers(0, 8, 8)
        members = [q for c in drawn for q in range(n) if cliques[q] == c]
        slow.append(np.mean([a[q] - b[q] for q in members]))
    assert mean == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert (low, high) == pytest.approx((np.quantile(slow, 0.025), np.quantile(slow, 0.975)), abs=1e-12)


def test_a_small_but_steady_gain_shows_although_queries_differ_much() -> None:
    rng = np.random.default_rng(1)
    cliques, plain = np.repeat(np.arange(40), 3), rng.random(120) * 0.9
    order = np.arange(120)
    mean, low, high = map_gain(
        rows(plain + 0.02 + 0.01 * rng.normal(size=120), cliques, order), rows(plain, cliques, order)
    )
    assert 0 < low < mean < high < 0.04
