"""Fixtures of the whisper tests: real Whisper base weights and real windows, made once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from whisper.model import Whisper

from tests.whisper.support import SONGS, first_window, tiny_model
from wealy_ray.whisper import LoadedModel, load_whisper
from wealy_ray.whisper.backend import Backend
from wealy_ray.whisper.encoder import BatchEncoder
from wealy_ray.whisper.packaged import assemble_base

NUM_WINDOWS = 14


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """Bits depend on the number of threads, so it is fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """Real Whisper base as a CTranslate2 folder, kept between sessions."""
    cache = Path(os.environ.get("WEALY_CACHE", Path(__file__).parents[2] / ".cache"))
    return assemble_base(cache / "whisper-base")


@pytest.fixture(scope="session")
def loaded_base(base_folder: Path) -> LoadedModel:
    return load_whisper(str(base_folder))


@pytest.fixture(scope="session")
def base(loaded_base: LoadedModel) -> Whisper:
    return loaded_base.model


@pytest.fixture(scope="session")
def mels() -> list[torch.Tensor]:
    """First windows of the example songs: six languages, five formats, one of them instrumental."""
    return [first_window(path) for path in sorted(SONGS.iterdir())[:NUM_WINDOWS]]


@pytest.fixture(scope="session")
def features(base: Whisper, mels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Our encoder's output for `mels`, [1500, 512] each."""
    encoder = BatchEncoder(base, 1, backend=Backend(), dtype=torch.float32)
    with torch.no_grad():
        return [encoder.encode([mel])[0] for mel in mels]


@pytest.fixture(scope="session")
def tiny() -> Whisper:
    return tiny_model()
