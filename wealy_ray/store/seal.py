"""Seals: a checksum of bytes within these bytes.

A damaged Parquet footer is not merely refused by its reader: some flipped bits end the whole process. So
footers are compared with a checksum of their own before anything parses them. It stands in the file's metadata,
where a placeholder of equal length is written first.
"""

from __future__ import annotations

import re

from wealy_ray.store.schema import checksum_of

MARK = "blake2b-sealed:"
PLACEHOLDER = MARK + "0" * 32
"""What to write, exactly once, into the bytes that are to be sealed."""


def seal(data: bytes) -> bytes:
    """`data` with the digits of its placeholder replaced by the checksum of `data`."""
    assert data.count(PLACEHOLDER.encode()) == 1
    return data.replace(PLACEHOLDER.encode(), (MARK + checksum_of(data)).encode())


def is_sealed(data: bytes) -> bool:
    """Whether `data` is what `seal` returned."""
    for match in re.finditer(MARK.encode() + rb"([0-9a-f]{32})", data):
        begin, end = match.span()
        original = data[:begin] + PLACEHOLDER.encode() + data[end:]
        if checksum_of(original).encode() == match.group(1):
            return True
    return False
