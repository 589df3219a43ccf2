"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.s3_server import S3Server
from wealy_ray.whisper.packaged import assemble_base

if not torch.cuda.is_available():  # Triton reads it when it is imported first, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def whisper_base() -> Path:
    """Real Whisper base as a CTranslate2 folder, assembled once and kept between sessions."""
    cache = Path(os.environ.get("WEALY_CACHE", Path(__file__).parents[1] / ".cache"))
    return assemble_base(cache / "whisper-base")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server; its credentials stand in the environment for the rest of the session."""
    server = S3Server().start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.env().items():
                patch.setenv(name, value)
            yield server
    finally:
        server.close()


@pytest.fixture
def s3_of_its_own() -> Iterator[S3Server]:
    """A server that a test may stop and start; nobody else uses it."""
    server = S3Server().start()
    try:
        yield server
    finally:
        server.close()
