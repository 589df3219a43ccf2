"""Where encoded bytes come from: ranged reads, so that a ten-hour file in a bucket is not fetched whole."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Protocol

BLOCK_BYTES = 1 << 20  # one ranged read: a five-minute mp3 takes about five
NUM_CACHED_BLOCKS = 8  # head, tail and the interleaved tables of an m4a at the same time


class ByteSource(Protocol):
    """Random access to the bytes of one object.

    Attributes:
        size: Length of the object in bytes.
    """

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes from `offset` on; fewer only where the object ends."""
        ...


def read_exactly(source: ByteSource, offset: int, length: int) -> bytes:
    """Read a range that lies inside the object.

    Raises:
        OSError: The source gave fewer or more bytes: the object changed, or the connection broke unnoticed.
    """
    data = source.read(offset, length)
    if len(data) != length:
        raise OSError(f"asked for {length} bytes at {offset} of {source.size}, got {len(data)}")
    return data


class BytesSource:
    """A `ByteSource` over bytes that are in memory already."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes from `offset` on; fewer only where the data ends."""
        return self._data[offset : offset + length]


class SourceFile:
    """A read-only file over a `ByteSource`, for libavformat: whole blocks are read, the last few are kept.

    The first exception of the source is kept in `error` and raised again by every later read: libavformat
    takes a failed read for the end of the file in places, which would look like a truncated track.

    Args:
        source: What to read from.

    Attributes:
        size: Length in bytes.
        error: The first exception of `source.read`, or `None`.
    """

    def __init__(self, source: ByteSource) -> None:
        self.size = source.size
        self.error: Exception | None = None
        self._source = source
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def seekable(self) -> bool:
        """Return `True`."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` bytes from the start, the position or the end, and return the new position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, length: int = -1) -> bytes:
        """Read at most `length` bytes, to the end of the block; `b""` only at the end of the file."""
        available = max(0, self.size - self._position)
        length = available if length < 0 else min(length, available)
        if length == 0:
            return b""
        index, start = divmod(self._position, BLOCK_BYTES)
        # PyAV copies what comes back into a buffer of `length` bytes without a check: never return more.
        data = self._block(index)[start : start + length]
        self._position += len(data)
        return data

    def read_at(self, offset: int, length: int) -> bytes:
        """Read the `length` bytes from `offset` on, fewer at the end, and leave the position alone."""
        kept, parts = self._position, []
        self._position = offset
        while length > 0 and (part := self.read(length)):
            parts.append(part)
            length -= len(part)
        self._position = kept
        return b"".join(parts)

    def _block(self, index: int) -> bytes:
        if self.error is not None:
            raise self.error
        if index in self._blocks:
            self._blocks.move_to_end(index)
            return self._blocks[index]
        offset = index * BLOCK_BYTES
        length = min(BLOCK_BYTES, self.size - offset)
        try:
            block = read_exactly(self._source, offset, length)
        except Exception as e:
            self.error = e
            raise
        self._blocks[index] = block
        if len(self._blocks) > NUM_CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return block
