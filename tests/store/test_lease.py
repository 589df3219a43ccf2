from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from wealy_ray.errors import TransientError
from wealy_ray.storage import Storage
from wealy_ray.store import Lease
from wealy_ray.store.lease import _host, is_held

LEASE_S = 0.6


@contextmanager
def held(lease: Lease) -> Iterator[None]:
    try:
        yield
    finally:
        lease.release()


def write_lease(storage: Storage, root: str, **changes: Any) -> None:
    content = {"run_id": "other", "host": "elsewhere", "pid": 1, "renewed_at": "-", "lease_s": LEASE_S}
    storage.write(f"{root}/lease.json", json.dumps({**content, **changes}).encode())


def acquire(storage: Storage, root: str) -> tuple[float, list[str]]:
    """Seconds until it was acquired, and what was said meanwhile."""
    said: list[str] = []
    began = time.monotonic()
    lease = Lease(storage, root, "mine", LEASE_S)
    lease.acquire(said.append)
    waited_s = time.monotonic() - began
    assert json.loads(storage.read(f"{root}/lease.json"))["run_id"] == "mine"
    lease.release()
    assert not storage.exists(f"{root}/lease.json")
    return waited_s, said


def test_a_free_store_is_taken_at_once(place: tuple[Storage, str]) -> None:
    assert acquire(*place)[1] == []  # waiting is never silent


def test_a_renewed_lease_is_waited_for_until_released(place: tuple[Storage, str]) -> None:
    storage, root = place
    lease_s = 2.0  # a busy machine must manage to renew it
    other = Lease(storage, root, "other", lease_s)
    other.acquire()
    timer = threading.Timer(3 * lease_s, other.release)
    timer.start()
    waited_s, said = acquire(storage, root)
    timer.join()
    assert waited_s >= 2.5 * lease_s  # longer than a stale lease would have been respected
    assert len(said) == 1
    assert "run other" in said[0]


def test_a_lease_that_nobody_renews_is_taken_over(storage: Storage, root: str) -> None:
    write_lease(storage, root)
    waited_s, said = acquire(storage, root)
    assert LEASE_S <= waited_s < 4 * LEASE_S
    assert len(said) == 1


def test_the_lease_of_a_dead_process_of_this_host_is_taken_at_once(storage: Storage, root: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    write_lease(storage, root, host=_host(), pid=process.pid, lease_s=100.0)
    waited_s, said = acquire(storage, root)
    assert waited_s < 50.0
    assert said == []


@pytest.mark.parametrize("content", [b"no json", b"[]", b'{"lease_s": "x", "pid": "y"}', b"\xff"])
def test_a_damaged_lease_is_replaced_after_its_time(storage: Storage, root: str, content: bytes) -> None:
    storage.write(f"{root}/lease.json", content)
    assert acquire(storage, root)[0] >= LEASE_S


def test_a_lease_taken_over_is_neither_renewed_nor_released(storage: Storage, root: str) -> None:
    mine = Lease(storage, root, "mine", LEASE_S)
    mine.acquire()
    write_lease(storage, root)
    content = storage.read(f"{root}/lease.json")
    time.sleep(LEASE_S)
    mine.release()
    assert storage.read(f"{root}/lease.json") == content


def test_a_renewal_that_fails_is_only_logged(root: str, caplog: pytest.LogCaptureFixture) -> None:
    class Flaky(Storage):
        fails = False

        def write(self, uri: str, data: bytes) -> None:
            if self.fails:
                raise TransientError("storage did not answer")
            super().write(uri, data)

    storage = Flaky()
    lease = Lease(storage, root, "mine", LEASE_S)
    lease.acquire()
    with held(lease):
        Flaky.fails = True
        time.sleep(LEASE_S / 2)
        assert "could not be renewed" in caplog.text
        Flaky.fails = False
        before = storage.read(f"{root}/lease.json")
        time.sleep(LEASE_S / 2)
        assert storage.read(f"{root}/lease.json") != before


def test_whether_somebody_is_at_work(storage: Storage, root: str) -> None:
    assert not is_held(storage, root)
    lease = Lease(storage, root, "mine", LEASE_S)
    lease.acquire()
    assert is_held(storage, root)
    lease.release()
    assert not is_held(storage, root)
    write_lease(storage, root)  # renewed at no time
    assert not is_held(storage, root)
    write_lease(storage, root, renewed_at="2026-01-01T00:00:00+00:00")
    assert not is_held(storage, root)
    write_lease(storage, root, renewed_at="2199-01-01T00:00:00+00:00")  # by another clock than ours
    assert is_held(storage, root)
