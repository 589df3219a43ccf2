from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tests.store.tracks import EXTRACTOR_ID, CountingStorage
from wealy_ray.storage import Storage


@pytest.fixture
def storage() -> CountingStorage:
    return CountingStorage()


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "store" / EXTRACTOR_ID)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    """A storage and a root on local disk, and the same on a real S3 server."""
    if request.param == "local":
        return Storage(), str(tmp_path / "store" / EXTRACTOR_ID)
    s3 = request.getfixturevalue("s3")
    return s3.storage(), f"{s3.bucket('stores')}/{uuid.uuid4().hex}/{EXTRACTOR_ID}"
