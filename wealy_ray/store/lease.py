"""The lease: a courtesy between drivers of one store, on top of fencing.

`lease.json` says who works on the store. Fencing keeps the store right without it; the lease keeps a second
driver from interrupting the first. Clocks of other hosts are not trusted: a lease is stale when its content
has not changed, by our own clock, for as long as it promises to be renewed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from wealy_ray.errors import WealyError
from wealy_ray.storage import ObjectMissingError, Storage, join

log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 4
POLLS_PER_LEASE = 20
LONGEST_POLL_S = 5.0


class Lease:
    """A lease on one store; usable as a context manager that acquires and releases.

    Args:
        storage: Where the store is.
        root: `<store>/<extractor_id>`.
        run_id: Who asks; unique per driver process.
        lease_s: Seconds without a renewal after which others may take over.
    """

    def __init__(self, storage: Storage, root: str, run_id: str, lease_s: float) -> None:
        self._storage, self._uri = storage, join(root, "lease.json")
        self._run_id, self._lease_s = run_id, lease_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, wait: Callable[[str], None] = log.info) -> None:
        """Waits until nobody else holds the lease, takes it, and renews it in the background.

        Args:
            wait: Is told, once, in one sentence, whom we are waiting for.

        Raises:
            StorageError, TransientError: The storage refuses, or does not answer.
        """
        content, since, told = self._read(), time.monotonic(), False
        while content is not None:
            other = _parse(content)
            if other.get("run_id") == self._run_id or _holder_is_gone(other):
                break
            patience_s = _patience_s(other, self._lease_s)
            if time.monotonic() - since >= patience_s:
                log.warning(
                    "run %s has not renewed its lease for %.0f s; taking over", _name(other), patience_s
                )
                break
            if not told:
                wait(
                    f"run {_name(other)} works on this store; waiting until it ends, or has not renewed its "
                    f"lease for {patience_s:.0f} s"
                )
                told = True
            time.sleep(min(patience_s / POLLS_PER_LEASE, LONGEST_POLL_S))
            seen = self._read()
            if seen != content:
                content, since = seen, time.monotonic()
        self._write()
        self._storage = self._storage.impatient()  # from here on it is a courtesy that nobody waits for
        self._stop.clear()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stops renewing and removes the lease, if it is still ours; faults are only logged."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        try:
            content = self._read()
            if content is not None and _parse(content).get("run_id") == self._run_id:
                self._storage.delete(self._uri)
        except WealyError as e:
            log.warning("the lease could not be released: %s", e)

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def _renew(self) -> None:
        is_failing = False
        while not self._stop.wait(self._lease_s / RENEWALS_PER_LEASE):
            try:
                content = self._read()
                other = _parse(content) if content is not None else {}
                if other.get("run_id", self._run_id) != self._run_id:
                    log.warning("run %s has taken over the lease of this store", _name(other))
                    return
                self._write()
                is_failing = False
            except WealyError as e:
                log.log(
                    logging.DEBUG if is_failing else logging.WARNING, "the lease could not be renewed: %s", e
                )
                is_failing = True

    def _read(self) -> bytes | None:
        try:
            return self._storage.read(self._uri)
        except ObjectMissingError:
            return None

    def _write(self) -> None:
        content = {
            "run_id": self._run_id,
            "host": _host(),
            "pid": os.getpid(),
            "renewed_at": datetime.now(UTC).isoformat(),
            "lease_s": self._lease_s,
        }
        self._storage.write(self._uri, json.dumps(content).encode())


def is_held(storage: Storage, root: str) -> bool:
    """Whether a driver seems to be at work; for people who look.

    It trusts the clocks of both hosts: nothing but words may depend on it.

    Args:
        storage: Where the lease is.
        root: As in `Lease`.
    """
    try:
        lease = _parse(storage.read(join(root, "lease.json")))
        renewed_at = datetime.fromisoformat(str(lease.get("renewed_at")))
        silent_s = (datetime.now(UTC) - renewed_at).total_seconds()
    except (ObjectMissingError, ValueError, TypeError):  # none, damaged, or a time without a zone
        return False
    return silent_s < _patience_s(lease, 0.0) and not _holder_is_gone(lease)


def _parse(content: bytes) -> dict[str, Any]:
    """The lease's fields; none when it is no lease (it is waited for like any other, and then replaced)."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(lease: dict[str, Any]) -> str:
    return f"{lease.get('run_id', 'unknown')} (host {lease.get('host')}, process {lease.get('pid')})"


def _patience_s(lease: dict[str, Any], default_s: float) -> float:
    promised_s = lease.get("lease_s")
    if isinstance(promised_s, bool) or not isinstance(promised_s, int | float) or not promised_s > 0:
        return default_s
    return float(promised_s)


def _host() -> str:
    """This host; with the process namespace, since containers may share a host's name but not its ids."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return socket.gethostname()


def _holder_is_gone(lease: dict[str, Any]) -> bool:
    """Whether the holder ran on this host and its process is gone."""
    pid = lease.get("pid")
    if lease.get("host") != _host() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
