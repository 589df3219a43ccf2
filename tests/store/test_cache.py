from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.store.test_extractor import SPEC
from tests.store.tracks import make_failed, make_track, write
from wealy_ray.errors import StoreError
from wealy_ray.storage import Storage
from wealy_ray.store import IndexWriter, Payloads, StoreReader, TrackCache
from wealy_ray.store.cache import USAGE
from wealy_ray.store.schema import checksum_of
from wealy_ray.store.shard import shard_uri

SIZE = 1000


def payload_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def key_of(number: int) -> str:
    return checksum_of(payload_of(number))


def store(cache: TrackCache, numbers: range) -> None:
    for number in numbers:
        cache.store(key_of(number), payload_of(number))


def found(cache: TrackCache, numbers: range) -> list[int]:
    """Which of them are there, each compared with what was stored."""
    here, out = [], bytearray(SIZE - 10)
    for number in numbers:
        if cache.read_into(key_of(number), SIZE, 10, memoryview(out)):
            assert out == payload_of(number)[10:]
            here.append(number)
    return here


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.name != USAGE]


def bytes_in(folder: Path) -> int:
    return sum(p.stat().st_size for p in files(folder))


def used_before(folder: Path, number: int, seconds: float) -> None:
    path = folder / key_of(number)[:2] / key_of(number)
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_what_was_stored_is_found(tmp_path: Path) -> None:
    cache = TrackCache(str(tmp_path), 100 * SIZE)
    assert found(cache, range(3)) == []
    store(cache, range(3))
    assert found(TrackCache(str(tmp_path), 100 * SIZE), range(5)) == [0, 1, 2]
    cache.drop(key_of(1))
    assert found(cache, range(5)) == [0, 2]


def test_the_longest_unused_make_room(tmp_path: Path) -> None:
    store(TrackCache(str(tmp_path), 10 * SIZE), range(10))
    for number in range(10):
        used_before(tmp_path, number, 1000 - number)
    cache = TrackCache(str(tmp_path), 10 * SIZE)
    found(cache, range(2))  # a use
    store(cache, range(10, 13))
    assert found(cache, range(20)) == [0, 1, *range(5, 13)]
    assert bytes_in(tmp_path) <= 10 * SIZE


def test_what_is_in_use_is_not_thrown_out_for_more_of_its_kind(tmp_path: Path) -> None:
    """A training that reads twice as much as fits, each track once per epoch, finds half of it again."""
    cache = TrackCache(str(tmp_path), 20 * SIZE)
    hits = 0
    for epoch in range(3):
        order = np.random.default_rng(epoch).permutation(40).tolist()
        hits = 0
        for number in order:
            hits += bool(found(cache, range(number, number + 1)))
            store(cache, range(number, number + 1))
    assert hits == 20
    assert bytes_in(tmp_path) == 20 * SIZE


def test_a_file_of_another_size_is_not_taken_for_the_track(tmp_path: Path) -> None:
    cache = TrackCache(str(tmp_path), 10 * SIZE)
    store(cache, range(1))
    (tmp_path / key_of(0)[:2] / key_of(0)).write_bytes(b"x")
    assert found(cache, range(1)) == []


def test_a_lost_count_is_made_anew(tmp_path: Path) -> None:
    store(TrackCache(str(tmp_path), 10 * SIZE), range(8))
    for more, damage in ((8, b""), (12, b"what?")):
        (tmp_path / USAGE).write_bytes(damage)
        cache = TrackCache(str(tmp_path), 10 * SIZE)
        store(cache, range(more, more + 4))
        assert 8 * SIZE < bytes_in(tmp_path) <= 10 * SIZE
    assert int((tmp_path / USAGE).read_bytes()) == bytes_in(tmp_path)


def test_a_full_disk_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TrackCache(str(tmp_path), 10 * SIZE)
    store(cache, range(1))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level(logging.WARNING):
        store(cache, range(1, 5))
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()
    assert found(cache, range(5)) == [0]
    assert len(files(tmp_path)) == 1, "no rest is left behind"


def test_a_folder_that_cannot_be_made_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = TrackCache(str(tmp_path / "file" / "cache"), 10 * SIZE)
    assert found(cache, range(2)) == []
    store(cache, range(2))
    assert len(caplog.records) == 1


def _churn(folder: str, seed: int, seconds: float) -> None:
    """Reads and stores at random, as one training after the other would."""
    stop, rng = time.monotonic() + seconds, np.random.default_rng(seed)
    cache = TrackCache(folder, 20 * SIZE)
    while time.monotonic() < stop:
        number = int(rng.integers(60))
        if not found(cache, range(number, number + 1)):
            store(cache, range(number, number + 1))
        cache.opened_s, cache._stores = time.time(), True


def test_killed_and_competing_processes_neither_damage_nor_overfill(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    crowd = [context.Process(target=_churn, args=(str(tmp_path), n, 60.0)) for n in range(3)]
    for process in crowd:
        process.start()
    most, stop = 0, time.monotonic() + 60
    while time.monotonic() < stop:
        most = max(most, bytes_in_locked(tmp_path))
        time.sleep(0.002)
        if most > 10 * SIZE:
            stop = min(stop, time.monotonic() + 3)
    for process in crowd:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert 10 * SIZE < most <= 20 * SIZE
    cache = TrackCache(str(tmp_path), 20 * SIZE)
    here = found(cache, range(60))  # compares each
    missing = [n for n in range(60) if n not in here]
    time.sleep(0.02)  # file times are coarse
    cache = TrackCache(str(tmp_path), 20 * SIZE)  # a new one: what was just compared may make room
    store(cache, range(missing[0], missing[0] + 1))
    assert missing[0] in found(cache, range(60)), "no lock is left behind"
    assert bytes_in(tmp_path) <= 20 * SIZE


def bytes_in_locked(folder: Path) -> int:
    """What files take while others wait: without the lock, one that is renamed could count twice."""
    with open(folder / USAGE, "ab") as usage:
        fcntl.flock(usage, fcntl.LOCK_EX)
        total = 0
        for path in files(folder):
            with contextlib.suppress(FileNotFoundError):  # one that found no room
                total += path.stat().st_size
        return total


class Remote(Storage):
    """Local files that count as remote, and how often they are asked for."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.asked: list[int] = []

    def is_local(self, _: str) -> bool:
        return False

    def read_into(self, uri: str, offset: int, out: memoryview) -> int:
        self.asked.append(len(out))
        return super().read_into(uri, offset, out)


TRACKS = [make_track(0, 200, 24), make_failed(1), make_track(2, 0, 24), make_track(3, 50, 24)]


@pytest.fixture
def remote(root: str) -> tuple[Remote, StoreReader]:
    storage = Remote()
    folder = SPEC.ensure(storage, root)
    writer = IndexWriter.claim(storage, folder, manifest_digest="d", run_id="r")
    for tracks in (TRACKS[:2], TRACKS[2:]):
        writer.publish(write(storage, folder, tracks, extractor_id=SPEC.extractor_id))
    return storage, StoreReader.open(storage, root)


def crop(payloads: Payloads, row: int, start: int, count: int) -> np.ndarray:
    out = np.full((count, 24), 9, np.float16)
    payloads.read(row, start, out)
    return out


def test_a_crop_comes_from_the_cache_the_second_time(
    remote: tuple[Remote, StoreReader], tmp_path: Path
) -> None:
    storage, reader = remote
    cache = TrackCache(str(tmp_path / "cache"), 2**20)
    payloads = Payloads.of(storage, reader.root, reader.index, cache)
    for start, count in ((13, 44), (150, 50), (0, 200), (0, 0)):
        np.testing.assert_array_equal(
            crop(payloads, 0, start, count), TRACKS[0].states[start : start + count]
        )
    assert storage.asked == [TRACKS[0].states.nbytes]
    without = Payloads.of(storage, reader.root, reader.index)
    np.testing.assert_array_equal(crop(without, 0, 13, 44), TRACKS[0].states[13:57])
    assert storage.asked[1:] == [44 * 24 * 2], "without a cache only the crop's bytes"


def test_a_damaged_file_of_the_cache_is_fetched_again(
    remote: tuple[Remote, StoreReader], tmp_path: Path
) -> None:
    storage, reader = remote
    cache = TrackCache(str(tmp_path / "cache"), 2**20)
    crop(Payloads.of(storage, reader.root, reader.index, cache), 3, 0, 50)
    (path,) = files(tmp_path / "cache")
    path.write_bytes(bytes(path.stat().st_size))
    later = Payloads.of(storage, reader.root, reader.index, cache)
    np.testing.assert_array_equal(crop(later, 3, 0, 50), TRACKS[3].states)
    assert len(storage.asked) == 2
    assert path.read_bytes() == TRACKS[3].states.tobytes()


@pytest.mark.parametrize("cached", [False, True])
def test_damage_of_the_store_names_shard_and_track(
    remote: tuple[Remote, StoreReader], tmp_path: Path, cached: bool
) -> None:
    storage, reader = remote
    cache = TrackCache(str(tmp_path / "cache"), 2**20) if cached else None
    row = reader.index.row("set:V-0")
    assert row is not None
    uri = shard_uri(reader.root, row["shard"])
    data = bytearray(storage.read(uri))
    data[row["payload_offset"] + 100] ^= 1
    storage.write(uri, bytes(data))
    with pytest.raises(StoreError, match=rf"{row['shard']} is damaged: the states of track 'set:V-0'"):
        crop(Payloads.of(storage, reader.root, reader.index, cache), 0, 0, 200)
    assert not (tmp_path / "cache").exists()
    storage.write(uri, bytes(data[: row["payload_offset"] + 100]))
    with pytest.raises(StoreError, match=rf"{row['shard']} is damaged: it is truncated .* 'set:V-0'"):
        crop(Payloads.of(storage, reader.root, reader.index, cache), 0, 3, 100)
    storage.delete(uri)
    with pytest.raises(StoreError, match=rf"{row['shard']} of track 'set:V-0' is gone"):
        crop(Payloads.of(storage, reader.root, reader.index, cache), 0, 3, 100)
