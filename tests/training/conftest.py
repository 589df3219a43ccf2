from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.songs import make_song_store
from wealy_ray.storage import Storage


@pytest.fixture(scope="session")
def song_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_song_store`."""
    folder = tmp_path_factory.mktemp("songs")
    make_song_store(str(folder), Storage())
    return folder
