"""On a real GPU: the same ranks as on the CPU. The counting pass is tested in `test_ranking`, with or without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.evaluation import evaluate
from wealy_ray.retrieval.fusion import LearnedFusion, RankFusion, WeightedScores
from wealy_ray.retrieval.metrics import mean_ap
from wealy_ray.retrieval.multi_vector import MultiVectorScores, PackedSets
from wealy_ray.retrieval.scores import Scores, VectorScores
from wealy_ray.retrieval.trivial import language_scores, random_scores

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
SIZE = 700


@pytest.fixture(scope="module")
def collection() -> Collection:
    rng = np.random.default_rng(1)
    return Collection.of(
        [f"t{i:04d}" for i in range(SIZE)],
        [f"c{c}" for c in rng.integers(0, 150, SIZE)],
        languages=list(rng.choice(["en", "es", "ja", ""], SIZE)),
        is_candidate=rng.random(SIZE) < 0.9,
    )


def vectors(collection: Collection, seed: int) -> VectorScores:
    """Cosines that rounding cannot change: few integers, each vector of length 4."""
    rng = np.random.default_rng(seed)
    x = np.zeros((SIZE, 64), np.float32)
    places = rng.permuted(np.tile(np.arange(64), (SIZE, 1)), axis=1)[:, :16]
    np.put_along_axis(x, places, rng.choice([-1.0, 1.0], (SIZE, 16)).astype(np.float32), 1)
    missing = np.zeros(SIZE, bool)
    missing[[3, 400 + seed]] = True
    return VectorScores.cosine(collection, x, missing)


def window_sets(collection: Collection, reduction: str) -> MultiVectorScores:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 9, SIZE)
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    values = rng.standard_normal((offsets[-1], 16)).astype(np.float32)
    packed = PackedSets.of_collection(collection, collection.track_ids, values, offsets)
    return MultiVectorScores(packed, collection.candidates, reduction=reduction)


def systems(collection: Collection) -> dict[str, Scores]:
    a, b, own = vectors(collection, 1), vectors(collection, 2), collection.column_of
    return {
        "vectors": a,
        "random": random_scores(collection),
        "language": language_scores(collection, collection.languages),
        "weighted": WeightedScores(a, b, own, weight=1.5),
        "z-scores": WeightedScores(a, b, own, weight=0.5, normalise="z_score"),
        "learned": LearnedFusion(a, b, own, 2.0, 1.0),
        "ranks": RankFusion(a, b, own),
        "min": window_sets(collection, "min"),
        "mean_min": window_sets(collection, "mean_min"),
        "bpwr": window_sets(collection, "bpwr-3"),
    }


def test_every_system_ranks_as_on_the_cpu(collection: Collection) -> None:
    for name, system in systems(collection).items():
        there, here = evaluate(system, collection, device=GPU), evaluate(system, collection)
        if name in {"vectors", "random", "language"}:  # nothing is rounded
            assert there.equals(here), name
        assert there.num_rows == here.num_rows
        assert mean_ap([there]) == pytest.approx(mean_ap([here]), abs=1e-3), name


def test_the_neighbours_of_a_tile_do_not_change_it(collection: Collection) -> None:
    rng = np.random.default_rng(5)
    system = VectorScores.cosine(
        collection, rng.standard_normal((SIZE, 64)).astype(np.float32), np.zeros(SIZE, bool)
    )
    queries = collection.queries[:256]
    whole = system.rows(queries, GPU)
    assert torch.equal(whole, system.rows(queries, GPU))
    assert torch.equal(whole[:100], system.rows(queries[:100], GPU))
    assert torch.allclose(whole.cpu(), system.rows(queries), atol=1e-6)  # no TF32
