"""An object as a file that can be read anywhere, by ranged reads: for libraries that want a file."""

from __future__ import annotations

import io

from wealy_ray.storage.access import Storage


class RangedFile(io.RawIOBase):
    """Reads what is asked for, and nothing ahead.

    Args:
        storage: Access.
        uri: The object.
        size: Its size in bytes.
    """

    def __init__(self, storage: Storage, uri: str, size: int) -> None:
        self._storage, self._uri, self._size = storage, uri, size
        self._place = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, origin + offset)
        return self._place

    def read(self, length: int = -1) -> bytes:
        """`length` bytes, fewer at the end; -1: all that is left."""
        left = max(0, self._size - self._place)
        data = self._storage.read_range(self._uri, self._place, left if length < 0 else min(length, left))
        self._place += len(data)
        return data
