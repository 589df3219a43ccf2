"""What is known of the network behind imported vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wealy_ray.model import ModelConfig
from wealy_ray.model.settings import AverageMLPSettings
from wealy_ray.retrieval.facts import facts_of_embeddings
from wealy_ray.storage import Storage

DATA = {"manifest": "m", "train": {"tracks": 9, "cliques": 4, "dropped": 0}, "languages": {"en": 9}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    config = ModelConfig(
        model=AverageMLPSettings(), input_dim=4, digest="d", extractor_id="e1", crop=8, data=DATA
    )
    model, root = tmp_path / "model", tmp_path / "store" / "e1" / "embeddings" / "abc"
    model.mkdir()
    (root / "shards").mkdir(parents=True)
    (model / "config.json").write_text(config.model_dump_json())
    (root / "embedder.json").write_text(json.dumps({"model": str(model), "crop": 8}))
    return root


@pytest.mark.parametrize("below", ["", "/", "/shards", "/one.parquet"])
def test_facts_come_from_the_model_that_embedded(place: Path, below: str) -> None:
    found = facts_of_embeddings(Storage(), str(place) + below)
    assert found == {"network": "avg_mlp", "extractor_id": "e1", "data": DATA}


def test_a_kept_model_counts_before_the_one_it_came_from(tmp_path: Path, place: Path) -> None:
    (place / "model").mkdir()
    (tmp_path / "model" / "config.json").rename(place / "model" / "config.json")
    found = facts_of_embeddings(Storage(), str(place))
    assert found == {"network": "avg_mlp", "extractor_id": "e1", "data": DATA}


def test_vectors_from_elsewhere_have_none(
    tmp_path: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert facts_of_embeddings(Storage(), str(tmp_path)) is None
    assert facts_of_embeddings(Storage(), "vectors.parquet") is None
    (tmp_path / "model" / "config.json").rename(tmp_path / "config.json")  # the model has moved
    assert facts_of_embeddings(Storage(), str(place)) is None
    assert not caplog.messages
    for content in ("{", "[]", "{}"):
        (place / "embedder.json").write_text(content)
        facts_of_embeddings(Storage(), str(place))
    assert [("is known of the network behind" in m) for m in caplog.messages] == [True] * len(caplog.messages)
    assert caplog.messages
