import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.retrieval import slow
from wealy_ray.retrieval.collection import Positives
from wealy_ray.retrieval.kernels import compiled
from wealy_ray.retrieval.ranking import rank_positives


@st.composite
def problems(draw):
    """Rows of scores with many ties, candidates without a score, queries outside the candidates, giant cliques."""
    num_rows, num_columns = draw(st.integers(1, 5)), draw(st.integers(2, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = rng.integers(-draw(st.integers(1, 40)), 3, (num_rows, num_columns)).astype(np.float32)
    scores[rng.random(scores.shape) < draw(st.sampled_from([0.0, 0.2]))] = -np.inf
    own = rng.integers(-1, num_columns, num_rows)
    share = draw(st.sampled_from([0.02, 0.2, 1.0]))
    relevant = [
        sorted(set(np.flatnonzero(rng.random(num_columns) < share).tolist()) - {int(own[i])})
        for i in range(num_rows)
    ]
    return scores, own.astype(np.int64), relevant


def as_positives(relevant):
    offsets = np.cumsum([0, *map(len, relevant)], dtype=np.int64)
    return Positives(offsets, np.array([c for row in relevant for c in row], np.int64))


def count(scores, positives, own):
    """The pass that a GPU runs; without one, Triton's interpreter runs it on the CPU."""
    counted = pytest.importorskip("wealy_ray.retrieval.counted", reason="no Triton", exc_type=ImportError)
    found = np.zeros((3, len(positives.columns)), np.int64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(positives.columns):
        counted.rank_by_counting(torch.from_numpy(scores).to(device), positives, own, found)
    return found


@pytest.mark.parametrize("path", ["compiled", "triton"])
@settings(max_examples=200, deadline=None)
@given(problem=problems())
def test_ranks_equal_a_sort(path, problem):
    scores, own, relevant = problem
    positives = as_positives(relevant)
    if path == "compiled":
        got = rank_positives(torch.from_numpy(scores), positives, own, num_threads=2)
        found = (got.ranks, got.optimistic, got.pessimistic)
    else:
        found = count(scores, positives, own)
    for i, mine in enumerate(relevant):
        part = slice(positives.offsets[i], positives.offsets[i + 1])
        assert found[0][part].tolist() == slow.ranks(scores[i], own[i], mine)
        assert found[1][part].tolist() == slow.extreme_ranks(scores[i], own[i], mine, best=True)
        assert found[2][part].tolist() == slow.extreme_ranks(scores[i], own[i], mine, best=False)


def test_the_gpu_pass_adds_its_blocks():
    counted = pytest.importorskip("wealy_ray.retrieval.counted", reason="no Triton", exc_type=ImportError)
    rng = np.random.default_rng(0)
    num_columns = 2 * counted.BLOCK + 77
    scores = rng.integers(0, 50, (3, num_columns)).astype(np.float32)
    scores[:, rng.integers(0, num_columns, 900)] = -np.inf
    relevant = [
        [1, counted.BLOCK - 1, counted.BLOCK],
        [],
        np.unique(rng.integers(0, num_columns, 40)).tolist(),
    ]
    positives, own = as_positives(relevant), np.array([counted.BLOCK + 1, 3, -1])
    found, other = (
        count(scores, positives, own),
        rank_positives(torch.from_numpy(scores), positives, own),
    )
    assert np.array_equal(found, np.stack([other.ranks, other.optimistic, other.pessimistic]))


def test_scores_are_left_as_they_were():
    scores = torch.rand(3, 20)
    before = scores.clone()
    rank_positives(scores, as_positives([[1], [2], [3]]), np.array([0, 1, 2]))
    assert torch.equal(scores, before)


def test_where_no_machine_code_can_be_kept_each_process_compiles(monkeypatch):
    njit = numba.njit

    def without_a_place(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available for file")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", without_a_place)
    assert compiled(lambda number: 2 * number)(3) == 6
