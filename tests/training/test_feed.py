from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.test_loop import a_recipe, splits_of
from wealy_ray.errors import StoreError, TransientError
from wealy_ray.storage import Storage
from wealy_ray.store.shard import shard_uri
from wealy_ray.training.data import Batches, Tracks
from wealy_ray.training.feed import Feed, Slot
from wealy_ray.training.loop import Splits
from wealy_ray.training.sampler import CliqueSampler


def batches_of(splits: Splits, rank: int = 0, world_size: int = 1, **changes: Any) -> Batches:
    sampler = CliqueSampler(splits.train.cliques, cliques_per_batch=5, seed=3)
    return Batches(splits.train, sampler, splits.crops, rank, world_size, num_passes=4, **changes)


@pytest.fixture
def splits(song_store: Path) -> Splits:
    return splits_of(a_recipe(song_store))


def test_a_step_holds_the_crops_of_its_tracks(splits: Splits) -> None:
    feed = Feed(batches_of(splits), (2, 1), 4, 0, pins=False)
    steps = 0
    for step in feed:
        rows = []
        for states, lengths in zip(step.states, step.lengths, strict=True):
            for padded, length in zip(states, lengths.tolist(), strict=True):
                assert not padded[length:].any(), "a slot's old states must not show"
                rows.append(padded[:length].numpy())
        for place, crop in zip(step.order.tolist(), rows, strict=True):
            track = splits.train.track_ids.index(step.tracks[place])
            whole = splits.crops.payloads
            full = np.empty((int(splits.train.lengths[track]), splits.crops.dim), np.float16)
            whole.read(int(splits.train.rows[track]), 0, full)
            assert len(crop) == min(40, len(full))
            assert any(
                np.array_equal(crop, full[s : s + len(crop)]) for s in range(len(full) - len(crop) + 1)
            )
        assert sum(s.nbytes for s in step.states) <= batches_of(splits).most_bytes
        steps += 1
    assert steps == 2 * batches_of(splits).sampler.steps(0) - 1


def test_loaders_give_the_same_steps_in_the_same_order(splits: Splits) -> None:
    alone = Feed(batches_of(splits, 1, 2), (0, 1), 9, 0, pins=False)
    feed = Feed(batches_of(splits, 1, 2), (0, 1), 9, 2, pins=False)
    count = 0
    for ours, theirs in zip(alone, feed, strict=True):
        assert (ours.epoch, ours.step, ours.tracks) == (theirs.epoch, theirs.step, theirs.tracks)
        for x, y in zip(ours.states + ours.lengths, theirs.states + theirs.lengths, strict=True):
            assert torch.equal(x, y)
        count += 1
    assert count == 9 * batches_of(splits).sampler.steps(0) - 1
    feed.close()


def test_starts_of_crops_are_as_likely_everywhere(splits: Splits) -> None:
    starts: dict[int, list[float]] = {}

    class Noting:
        length, dim = splits.crops.length, splits.crops.dim

        def read(self, row: int, start: int, _: np.ndarray) -> None:
            starts.setdefault(row, []).append(start)

    batches = Batches(splits.train, batches_of(splits).sampler, Noting(), 0, 1, 4)  # type: ignore[arg-type]
    for _ in Feed(batches, (0, 0), 300, 0, pins=False):
        pass
    for row, length in zip(splits.train.rows.tolist(), splits.train.lengths.tolist(), strict=True):
        last = max(0, length - 40)
        assert 0 <= min(starts[row]) <= max(starts[row]) <= last
        spread = last / np.sqrt(12 * len(starts[row]))
        assert abs(np.mean(starts[row]) - last / 2) <= 4.5 * spread + 1e-9


def test_a_missing_shard_is_a_sentence(song_store: Path, tmp_path: Path) -> None:
    shutil.copytree(song_store, tmp_path / "copy")
    splits = splits_of(a_recipe(tmp_path / "copy"))
    payloads = splits.crops.payloads
    Storage().delete(shard_uri(payloads.root, payloads.shards[0]))
    for loaders in (0, 1):
        feed = Feed(batches_of(splits), (0, 0), 2, loaders, pins=False)
        with pytest.raises(StoreError, match=r"the shard .* of track 'set:V-\d+' is gone"):
            next(feed)
        feed.close()


def test_a_killed_loader_is_a_sentence(splits: Splits) -> None:
    feed = Feed(batches_of(splits), (0, 0), 1000, 2, pins=False)
    next(feed)
    pids = [loader._process.pid for loader in feed._loaders]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(TransientError, match="was killed by signal 9; if memory ran out, lower"):
        list(islice(feed, 20))
    feed.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _feed_for_ever(place: Path, pipe: Any) -> None:
    feed = Feed(batches_of(splits_of(a_recipe(place))), (0, 0), 1000, 2, pins=False)
    next(feed)
    pipe.send([loader._process.pid for loader in feed._loaders])
    time.sleep(600)


def test_loaders_end_with_a_training_that_is_killed(song_store: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    training = context.Process(target=_feed_for_ever, args=(song_store, theirs))
    training.start()
    loaders = [psutil.Process(pid) for pid in pipe.recv()]
    training.kill()
    training.join()
    _, alive = psutil.wait_procs(loaders, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=4, max_size=40),
    st.integers(2, 6),
    st.integers(2, 3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
)
def test_no_step_outgrows_its_slot(lengths, slots, versions, num_passes, world_size, gathers):
    class Sized:
        length, dim = 50, 2

        def read(self, row: int, start: int, out: np.ndarray) -> None:
            pass

    cliques = np.arange(len(lengths)) // 2
    ids = [str(i) for i in range(len(lengths))]
    tracks = Tracks(ids, np.arange(len(ids)), cliques, [""] * len(ids), np.array(lengths), 0)
    sampler = CliqueSampler(cliques, cliques_per_batch=slots, versions_per_clique=versions)
    with ThreadPoolExecutor(1) as pool:
        for rank in range(world_size):
            batches = Batches(tracks, sampler, Sized(), rank, world_size, num_passes, gathers)
            if not gathers and sampler.slots < world_size:
                continue  # a rank without cliques
            for step in range(sampler.steps(0)):
                found = batches.read((0, step), Slot(batches.most_bytes).memory, pool)
                assert sum(s.nbytes for s in found.states) <= batches.most_bytes
