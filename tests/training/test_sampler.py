import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wealy_ray.errors import ManifestError
from wealy_ray.training.sampler import CliqueSampler


def cliques_of(sizes, rng):
    cliques = np.repeat(np.arange(len(sizes)), sizes)
    cliques = np.concatenate([cliques, [-1, -1, -1]])
    return rng.permutation(cliques)


sizes = st.lists(st.integers(1, 9), min_size=2, max_size=25).filter(lambda s: sum(n > 1 for n in s) >= 2)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(1, 12), st.integers(2, 5), st.sampled_from(["cliques", "versions"]), st.booleans())
def test_batches_hold_each_clique_and_track_at_most_once(found, per_batch, versions, epoch_by, mined):
    rng = np.random.default_rng(len(found))
    cliques = cliques_of(found, rng)
    sampler = CliqueSampler(
        cliques, cliques_per_batch=per_batch, versions_per_clique=versions, seed=3, epoch_by=epoch_by
    )
    if mined:
        count = len(sampler.members)
        near = np.stack([rng.permutation([j for j in range(count) if j != i])[:3] for i in range(count)])
        sampler.set_neighbours(near)
    for epoch in (0, 1):
        for step in range(sampler.steps(epoch)):
            batch = sampler.batch(epoch, step)
            assert len(set(batch.tracks.tolist())) == len(batch.tracks)
            assert (cliques[batch.tracks] == batch.cliques).all()
            assert (batch.cliques >= 0).all()
            numbers = batch.cliques[np.cumsum(batch.slot_sizes) - 1]
            assert len(set(numbers.tolist())) == len(batch.slot_sizes) == sampler.slots
            for number, size in zip(numbers, batch.slot_sizes, strict=True):
                assert size == min(versions, found[number])
            for world_size in (1, 2, 3):
                shares = [batch.share(rank, world_size) for rank in range(world_size)]
                rows = np.concatenate([batch.tracks[s] for s in shares])
                assert (rows == batch.tracks).all()
                for share in shares:  # a rank has whole slots
                    inside = set(batch.cliques[share].tolist())
                    outside = np.delete(batch.cliques, np.arange(share.start, share.stop))
                    assert not inside & set(outside.tolist())


def test_an_epoch_by_cliques_has_each_once_and_one_by_versions_each_version_once_as_anchor():
    rng = np.random.default_rng(0)
    cliques = cliques_of([2, 3, 5, 2, 4, 8, 2, 2], rng)
    by_cliques = CliqueSampler(cliques, cliques_per_batch=2, seed=1)
    seen = np.concatenate([np.unique(by_cliques.batch(0, s).cliques) for s in range(by_cliques.steps(0))])
    assert sorted(seen) == list(range(8))
    by_versions = CliqueSampler(cliques, cliques_per_batch=2, seed=1, epoch_by="versions")
    anchors = [
        batch.tracks[np.cumsum(batch.slot_sizes) - batch.slot_sizes]
        for batch in (by_versions.batch(0, s) for s in range(by_versions.steps(0)))
    ]
    anchors = np.concatenate(anchors)
    assert len(set(anchors.tolist())) == len(anchors)
    assert len(anchors) >= 28 - 8  # what does not fill a batch is left out


def test_a_batch_depends_on_nothing_but_seed_epoch_and_step():
    cliques = cliques_of([3] * 20, np.random.default_rng(2))
    one, two = (CliqueSampler(cliques, cliques_per_batch=4, seed=7) for _ in range(2))
    forward = [one.batch(e, s).tracks.tolist() for e in range(3) for s in range(5)]
    backward = [two.batch(e, s).tracks.tolist() for e in (2, 1, 0) for s in (4, 3, 2, 1, 0)]
    assert forward == backward[::-1]
    other = CliqueSampler(cliques, cliques_per_batch=4, seed=8)
    assert forward != [other.batch(e, s).tracks.tolist() for e in range(3) for s in range(5)]
    assert len({str(batch) for batch in forward}) == 15
    # versions are drawn, not always the same two
    pairs = {
        tuple(sorted(b.tracks[b.cliques == 4]))
        for b in (one.batch(e, s) for e in range(30) for s in range(5))
    }
    assert len([p for p in pairs if p]) == 3


def test_neighbours_stand_in_the_batch():
    cliques = np.repeat(np.arange(40), 2)
    sampler = CliqueSampler(cliques, cliques_per_batch=8, seed=0)
    near = (np.arange(40)[:, None] + np.array([1, 2])) % 40
    sampler.set_neighbours(near)
    for step in range(sampler.steps(0)):
        batch = sampler.batch(0, step)
        numbers = batch.cliques[::2]
        for first, second in zip(numbers[:4], numbers[4:], strict=True):
            assert second in near[first] or not set(near[first]) - set(numbers)


def test_nothing_to_learn_is_one_sentence():
    with pytest.raises(ManifestError, match=r"at least two cliques with two versions each .*; there are 1"):
        CliqueSampler(np.array([0, 0, 1, 2, -1]))
