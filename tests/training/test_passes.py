import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wealy_ray.training.passes import plan_passes


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=60), st.integers(1, 12), st.integers(1, 6))
def test_every_row_once_and_the_same_passes_for_any_number_of_ranks(found, num_passes, world_size):
    lengths = np.array(found)
    plan = plan_passes(lengths, num_passes, world_size)
    assert sorted(plan.gathered.tolist()) == list(range(len(found)))
    assert sum(plan.sizes) == len(found)
    assert len(plan.passes) <= num_passes
    alone = plan_passes(lengths, num_passes, 1)
    assert [p.tolist() for p in alone.passes] == [p.tolist() for p in plan.passes]
    assert 0 <= plan.padded_share < 1
    assert sorted(n for mine in plan.ranks for n in mine) == list(range(len(plan.passes)))


def test_ranks_have_like_work_and_little_padding():
    lengths = np.minimum(np.random.default_rng(0).gamma(4, 250, 128).astype(int) + 20, 1500)
    whole = 1 - lengths.sum() / (128 * lengths.max())
    plan = plan_passes(lengths, 8, 4)
    assert plan.padded_share < 0.4 * whole
    work = [sum(len(plan.passes[n]) * lengths[plan.passes[n]].max() for n in mine) for mine in plan.ranks]
    assert max(work) < 1.35 * min(work)
