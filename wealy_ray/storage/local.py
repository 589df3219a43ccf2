"""Local disk: atomic writes, one winner of a name, listings that survive writers at work."""

from __future__ import annotations

import errno
import os
import stat
import uuid

from wealy_ray.storage.info import ObjectInfo

NO_HARD_LINK_ERRNO = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
TEMPORARY_PREFIX = ".tmp-"


def info_of(uri: str, status: os.stat_result) -> ObjectInfo:
    """Version of a file: its modification time and size."""
    # nanoseconds tell two writes of one second apart, and the size tells a copy that kept its time
    return ObjectInfo(uri, status.st_size, f"mtime-{status.st_mtime_ns}-{status.st_size}")


def read_into(path: str, offset: int, out: memoryview) -> int:
    """Fills `out` from a file; returns how many bytes there were."""
    # opening anew costs 1 % of reading a crop, and files of a large store would hardly be open already
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fill(fd, offset, out)
    finally:
        os.close(fd)


def fill(fd: int, offset: int, out: memoryview) -> int:
    """Fills `out` from an open file; returns how many bytes there were."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def list_files(path: str) -> list[ObjectInfo]:
    """All files below a folder; ones that vanish meanwhile are left out (fsspec would list nothing at all)."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    names = [
        os.path.join(folder, name)
        for folder, _, files in os.walk(path, onerror=refuse)
        for name in files
        if not name.startswith(TEMPORARY_PREFIX)
    ]
    found = []
    for name in sorted(names or [path]):
        try:
            status = os.stat(name)
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            found.append(info_of(name, status))
    return found


def link(temporary: str, path: str, data: bytes) -> bool:
    """Gives a temporary file its name; False when the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno not in NO_HARD_LINK_ERRNO:
            raise
        return _write_new(path, data)
    return True


def _write_new(path: str, data: bytes) -> bool:
    """For file systems without hard links (some network and FUSE mounts): one winner, but not atomic."""
    try:
        with open(path, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except FileExistsError:
        return False
    return True


class temporary_beside:  # noqa: N801 (used like a function)
    """A flushed temporary file with `data` in the folder of `path`; removed at the end if still there."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.data = path, data

    def __enter__(self) -> str:
        folder = os.path.dirname(self.path)
        os.makedirs(folder, exist_ok=True)
        self.name = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            with open(self.name, "xb") as f:
                f.write(self.data)
                f.flush()
                os.fsync(f.fileno())
        except BaseException:  # a full disk, or an interruption: leave no rest behind
            self.__exit__()
            raise
        return self.name

    def __exit__(self, *exc: object) -> None:
        if os.path.exists(self.name):
            os.unlink(self.name)
