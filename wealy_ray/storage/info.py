"""What identifies one version of an object."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class ObjectInfo:
    """What identifies one version of an object.

    Attributes:
        uri: The object.
        size: Bytes.
        etag: The store's entity tag; on local disk the modification time and size; elsewhere, where there is
            no tag, the time.
    """

    uri: str
    size: int
    etag: str


def object_info(uri: str, found: dict[str, Any]) -> ObjectInfo:
    """From what an fsspec file system says of an object."""
    etag = next((found[k] for k in ("ETag", "etag", "mtime", "LastModified", "created") if found.get(k)), "")
    if isinstance(etag, datetime):  # memory:// gives a time in two shapes
        etag = etag.timestamp()
    return ObjectInfo(uri, int(found["size"] or 0), str(etag).strip('"'))
