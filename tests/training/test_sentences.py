"""Sentences as a store of vectors, and a training on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from tests.sentence_model import make_sentence_model
from tests.store.tracks import EXTRACTOR_ID, make_failed, make_track, write
from tests.training.test_loop import MODEL, a_recipe
from wealy_ray import load_model
from wealy_ray.catalog import read_manifest, write_manifest
from wealy_ray.errors import ConfigError, StoreError
from wealy_ray.storage import Storage, join
from wealy_ray.store import IndexWriter, StoreReader, WindowInfo
from wealy_ray.training.alone import train_alone
from wealy_ray.training.crops import CropReader
from wealy_ray.training.data import Tracks
from wealy_ray.training.measure import Embedder, validation_map
from wealy_ray.training.sentences import sentence_reader, split_sentences

WORDS = [
    f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me", "no", "ra") for b in ("la", "ri", "so", "tu", "ve")
]
CLIQUES, VERSIONS = 24, 3
SPLITS = ["train"] * 15 + ["val"] * 5 + ["test"] * 4
IDS = [f"set:V-{number}" for number in range(CLIQUES * VERSIONS)]
SILENT, FAILED, UNKNOWN = "set:V-800", "set:V-900", "set:V-901"


def windows_of(number: int) -> tuple[WindowInfo, ...]:
    """Seven of a work's ten lines, in two windows, and a window of music."""
    lines = np.random.default_rng([1, number // VERSIONS]).choice(WORDS, (10, 5))
    sung = np.random.default_rng([2, number]).permutation(10)[:7]
    texts = [" ".join(lines[line]).capitalize() for line in sung]
    parts = [". ".join(texts[:3]) + ".", "...", "! ".join(texts[3:])]
    return tuple(
        WindowInfo(30.0 * i, 30.0 * i + 30, "en", text, 0.25, -0.5, 1.5, 0.0) for i, text in enumerate(parts)
    )


def make_text_store(folder: Path) -> None:
    """`manifest.parquet` and `store/` of three shards."""
    storage, root = Storage(), join(str(folder), "store", EXTRACTOR_ID)
    storage.write(join(root, "extractor.json"), b'{"max_duration_s": 300}')
    tracks = [make_track(n, windows=windows_of(n), text="w") for n in range(len(IDS))]
    music = WindowInfo(0.0, 30.0, "en", "\u266a", 0.75, -0.5, 1.5, 0.0)
    tracks += [make_track(800, windows=(music, music)), make_failed(900)]
    writer = IndexWriter.claim(storage, root, manifest_digest="0" * 64, run_id="run")
    for first in range(0, len(tracks), 28):
        writer.publish(write(storage, root, tracks[first : first + 28]))
    ids = [*IDS, SILENT, FAILED, UNKNOWN]
    table = {
        "track_id": ids,
        "audio_uri": [f"s3://a/{i}" for i in ids],
        "clique_id": [f"c{n // VERSIONS:02d}" for n in range(len(IDS))] + ["c00"] * 3,
        "split": [SPLITS[n // VERSIONS] for n in range(len(IDS))] + ["train"] * 3,
    }
    write_manifest(storage, join(str(folder), "manifest.parquet"), pa.table(table))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    make_text_store(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_sentence_model(tmp_path_factory.mktemp("model"), WORDS))


@pytest.fixture
def source(place: Path) -> StoreReader:
    return StoreReader.open(Storage(), str(place / "store"))


def a_sentence_recipe(place: Path, model: str, **changes: Any) -> Any:
    data = {"crop": 6, "cliques_per_batch": 5, "sentences": model}
    network = {**MODEL, "width": 32, "feed_forward": 32, "output_dim": 16, "pooling": "mean"}
    optimiser = {"learning_rate": 1e-2, "epochs": 12, "warmup_epochs": 1}
    validation = {"every_epochs": 4}
    settings = {"data": data, "model": network, "optimiser": optimiser, "validation": validation}
    return a_recipe(place, **{**settings, **changes})


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        (" \u266a ... ", []),
        ("we sail away and away", ["we sail away and away"]),
        ("We sail. Away! Why?  So... far", ["We sail.", "Away!", "Why?", "So...", "far"]),
        ("At 3.15 p.m\nwe sail", ["At 3.15 p.m", "we sail"]),
        ("\u6b4c\u3046\u3002\u6d77\uff01\u5c71", ["\u6b4c\u3046\u3002", "\u6d77\uff01", "\u5c71"]),
        ("\u0915\u0964 \u0916", ["\u0915\u0964", "\u0916"]),
    ],
)
def test_sentences_end_where_whisper_ends_them(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_a_store_of_sentences_reads_as_one_of_states(source: StoreReader, tmp_path: Path, model: str) -> None:
    from sentence_transformers import SentenceTransformer

    reader = sentence_reader(source, str(tmp_path), model, [*IDS, SILENT, FAILED, UNKNOWN])
    encoder, crops = SentenceTransformer(model), CropReader(reader, 4)
    rows = crops.rows([*IDS, SILENT, FAILED, UNKNOWN])
    assert crops.dim == 32
    assert crops.num_states(rows).tolist() == [7] * len(IDS) + [0, 0, 0]
    for track_id, row in list(zip(IDS, rows.tolist(), strict=False))[::7]:
        track = reader.track(track_id)
        sentences = [s for w in windows_of(int(track_id[6:])) for s in split_sentences(w.text)]
        expected = np.stack([encoder.encode(sentence) for sentence in sentences])
        np.testing.assert_allclose(track.states, expected, atol=2e-3)
        np.testing.assert_array_equal(crops.at(row, 2), track.states[2:6])
        assert track.window.tolist() == [0, 0, 0, 2, 2, 2, 2]
        assert (track.windows, track.text) == (windows_of(int(track_id[6:])), "w")
    assert reader.track(SILENT).text == source.track(SILENT).text


def test_what_is_there_is_not_encoded_again(
    source: StoreReader, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = sentence_reader(source, str(tmp_path), model, IDS[:40])
    assert len(some.index) == 40
    reader = sentence_reader(source, str(tmp_path), model, IDS)
    assert reader.extractor_id == some.extractor_id
    assert len(reader.index) == len(IDS)
    for track_id in IDS[:40]:
        assert reader.index.row(track_id) == some.index.row(track_id)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # it could not encode now
    again = sentence_reader(source, str(tmp_path), model, IDS[:50])
    assert again.index.number == reader.index.number
    with pytest.raises(
        ConfigError, match=r"need 'sentence_transformers', which is not installed: pip install"
    ):
        sentence_reader(source, str(tmp_path), model, [*IDS, SILENT])
    assert not list(tmp_path.glob("**/lease.json"))


def test_vectors_of_two_encoders_never_mix(source: StoreReader, tmp_path: Path) -> None:
    model = make_sentence_model(tmp_path / "model", WORDS)
    one = sentence_reader(source, str(tmp_path / "out"), str(model), IDS[:5])
    make_sentence_model(tmp_path / "model", WORDS, seed=1)
    other = sentence_reader(source, str(tmp_path / "out"), str(model), IDS[:9])
    assert one.extractor_id != other.extractor_id
    assert len(other.index) == 9
    assert not np.allclose(one.states(IDS[0]), other.states(IDS[0]), atol=0.05)


def test_numbers_that_half_precision_cannot_hold_are_one_sentence(
    source: StoreReader, tmp_path: Path
) -> None:
    model = make_sentence_model(tmp_path / "model", WORDS)
    from safetensors.torch import load_file, save_file

    (path,) = model.glob("**/model.safetensors")
    weights = load_file(path)
    norms = [name for name in weights if "layer.1.output.LayerNorm.weight" in name]
    save_file(weights | {name: weights[name] * 1e6 for name in norms}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"numbers for track 'set:V-\d+' that half precision cannot hold"):
        sentence_reader(source, str(tmp_path / "out"), str(model), IDS)


def test_a_training_on_sentences_learns(place: Path, model: str, tmp_path: Path) -> None:
    recipe = a_sentence_recipe(place, model, out=str(tmp_path / "out"))
    job = train_alone(recipe)
    assert job.counts()["train"] == {"tracks": 45, "cliques": 15, "dropped": 3}
    history = job.history()
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    trained = load_model(job.model_uri)
    config = trained.config
    assert (config.sentences, config.input_dim, config.extractor_id) == (model, 32, job.fed.extractor_id)
    assert model in (tmp_path / "out" / "model" / "README.md").read_text()
    with pytest.raises(
        StoreError, match=r"fed sentences as vectors of '.*', whose store is .*: name the folder"
    ):
        trained.check_extractor(job.reader.extractor_id)

    # tracks of another split, evaluated in this process
    crops = CropReader(StoreReader.open(Storage(), str(tmp_path / "out" / "sentences")), config.crop)
    tracks = Tracks.of_split(read_manifest(Storage(), recipe.manifest).table, recipe.manifest, "test", crops)
    assert len(tracks) == 12
    embedder = Embedder(trained.network, crops, 0, 1, torch.device("cpu"))
    found = validation_map(tracks, *embedder.embed(tracks, windows=True))
    assert found > 0.6, "of 12 tracks in cliques of 3, chance is at 0.3"


def test_an_absent_extra_is_one_sentence(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'wealy-ray\[text\]'"):
        train_alone(a_sentence_recipe(place, "any", out=str(tmp_path / "out")))


def test_sentences_have_no_kinds(place: Path) -> None:
    data = {"kinds": ["text"], "sentences": "any"}
    with pytest.raises(ValidationError, match="kinds are of states, and sentences have none"):
        a_recipe(place, data=data)
