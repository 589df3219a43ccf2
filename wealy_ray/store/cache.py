"""Tracks of a remote store, kept on this machine's disk.

What is kept is one track's payload, named by its checksum. A crop wants one track in the 64 of a shard of 150 MB: to
fetch shards whole would be to read 64 times too much, unless the cache held them all; and a crop's own bytes would
hardly ever be asked for again, since crops begin anywhere, and have no checksum.

All processes of a machine share a folder. A file appears whole or not at all; `usage` holds the sum of all sizes and
is also the lock of whoever changes it, which the kernel lets go of when a process dies. What a killed process leaves
behind is counted until a recount removes it, so the limit holds at any time.

When there is no room, the tracks that were used longest ago go, but none that was used since this cache was opened: a
training comes back to each track once per epoch, in random order, and a cache of half the store that threw out what it
has just read would find 15 % of it again instead of 50 %.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from wealy_ray.storage.faults import reason_of
from wealy_ray.storage.local import TEMPORARY_PREFIX, fill

log = logging.getLogger(__name__)

USAGE = "usage"
MARGIN = 64
"""At least one part in so many is made free at a time: looking through the folder takes seconds."""
LOCK_TRIES, LOCK_PAUSE_S = 20, 0.001
ABANDONED_S = 3600.0
"""A temporary file of this age is of a process that was killed."""


class TrackCache:
    """Payloads by their checksums; small, picklable, and safe to use from many processes and threads.

    A fault of the disk, such as no space, is warned of once; from then on nothing more is stored.

    Args:
        folder: Where it is, `~` is the user's home; may be shared by trainings.
        limit_bytes: What all files may take together.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        self.folder = os.path.expanduser(folder)
        self.limit_bytes = limit_bytes
        self.opened_s = time.time()
        self._stores = True

    def read_into(self, key: str, size: int, offset: int, out: memoryview) -> bool:
        """Fills `out` from a payload, which counts as a use of it; False when it is not here.

        Args:
            key: Its checksum.
            size: Its bytes.
            offset: First byte.
            out: Filled.
        """
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if os.fstat(fd).st_size != size or fill(fd, offset, out) != len(out):
                return False
            os.utime(fd)
        except OSError as e:
            self._give_up(e)
            return False
        finally:
            os.close(fd)
        return True

    def store(self, key: str, payload: bytes | memoryview) -> None:
        """Keeps a payload that was compared with its checksum; does nothing when there is no room."""
        path = self._path(key)
        if not self._stores or len(payload) > self.limit_bytes or os.path.exists(path):
            return
        temporary = os.path.join(os.path.dirname(path), f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "xb") as file:
                if not self._reserve(file, len(payload)):
                    os.unlink(temporary)
                    return
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())  # or a crash of the machine could leave a name without its bytes
            with self._usage() as usage:  # a recount sees it under one of its names, never under none
                if usage is None:
                    os.unlink(temporary)
                else:
                    os.rename(temporary, path)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            self._give_up(e)

    def drop(self, key: str) -> None:
        """Forgets a payload that turned out to be damaged."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(key))

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key[:2], key)

    def _reserve(self, file: BinaryIO, size: int) -> bool:
        """Counts `size` bytes and takes them from the disk; False when there is no room, or others are counting."""
        with self._usage() as usage:
            if usage is None:
                return False
            used = _number_in(usage)
            if used is None or used + size > self.limit_bytes:
                used = self._make_room(size)
            fits = used + size <= self.limit_bytes
            usage.seek(0)
            usage.write(b"%020d" % (used + size if fits else used))
            if fits:
                os.posix_fallocate(file.fileno(), 0, size)  # a recount finds it at its full size
            else:
                self._stores = False  # all that is here was used since this cache was opened
        return fits

    @contextlib.contextmanager
    def _usage(self) -> Iterator[BinaryIO | None]:
        """The count, locked; None when somebody else holds it for long: nobody waits for a recount."""
        fd = os.open(os.path.join(self.folder, USAGE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with open(fd, "r+b", buffering=0) as usage:
            for _ in range(LOCK_TRIES):
                try:
                    fcntl.flock(usage, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(LOCK_PAUSE_S)
                else:
                    yield usage
                    return
            yield None

    def _make_room(self, size: int) -> int:
        """Recounts, and removes what was used longest ago until `size` bytes and a margin are free.

        Returns:
            Bytes that are used then.
        """
        used, old = 0, []
        for folder in Path(self.folder).iterdir():
            for entry in os.scandir(folder) if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    used += status.st_size
                    is_temporary = entry.name.startswith(TEMPORARY_PREFIX)
                    if status.st_mtime < (time.time() - ABANDONED_S if is_temporary else self.opened_s):
                        old.append((status.st_mtime, entry.path, status.st_size))
        if used + size <= self.limit_bytes:
            return used
        for _, path, num_bytes in sorted(old):
            if used + max(size, self.limit_bytes // MARGIN) <= self.limit_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                used -= num_bytes
        return used

    def _give_up(self, error: OSError) -> None:
        if self._stores:
            self._stores = False
            log.warning(
                "the cache %s cannot be written (%s); going on without storing more, tracks are read from the store",
                self.folder,
                reason_of(error),
            )


def _number_in(usage: BinaryIO) -> int | None:
    found = usage.read(20)
    return int(found) if found.isdigit() else None
