"""`wealy search` over a store of tiny tracks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.pipelines.support import call_wealy, run_wealy, save_test_model
from tests.whisper.support import tiny_model
from wealy_ray.model.recipe import EmbedRecipe
from wealy_ray.pipelines.embed import run_embed
from wealy_ray.storage import Storage
from wealy_ray.store import StoreReader, list_embedders


@pytest.fixture(scope="module")
def store(undisturbed: tuple[Path, dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: what is computed of states is kept beside them."""
    there = tmp_path_factory.mktemp("search") / "store"
    shutil.copytree(undisturbed[0].parent / "store", there)
    return there


def lines(output: str) -> list[list[str]]:
    """Rank, score and track of each line that names one."""
    rows = [line.split() for line in output.splitlines()]
    return [row[:3] for row in rows if len(row) >= 3 and row[0].isdigit() and row[1][0] in "-0123456789"]


def test_an_audio_file_finds_itself(undisturbed: tuple[Path, dict], store: Path) -> None:
    audio = undisturbed[0].parent / "audio" / "t006.wav"
    code, output = run_wealy("search", store, audio, "--by", "avg_embedding", "--top", "3")
    assert code == 0, output
    assert "among 40 tracks (exact)" in output
    rank, score, track = lines(output)[0]
    assert (rank, score) == ("1", "1.000")
    assert track.endswith("t006.wav")
    assert len(lines(output)) == 3
    kept = list(store.glob("*/material/1/*.parquet"))
    assert len(kept) == len(list(store.glob("*/shards/*.parquet")))
    damaged = kept[0]
    damaged.write_bytes(damaged.read_bytes()[:100])  # computed again
    code, again = call_wealy("search", store, audio, "--by", "avg_embedding", "--top", "3")
    assert code == 0, again
    assert lines(again) == lines(output)


def test_a_track_finds_its_neighbours_exactly_and_approximately(store: Path, tmp_path: Path) -> None:
    ask = ("search", store, "t006.wav", "--by", "avg_embedding", "--top", "5")
    code, exact = call_wealy(*ask)
    assert code == 0, exact
    assert "among 39 tracks (exact)" in exact
    assert not any(row[2] == "t006.wav" for row in lines(exact))
    code, found = call_wealy(*ask, "--approximate", tmp_path)
    assert code == 0, found
    assert "approximate: 100.0% of the exact 10 nearest are found" in found
    assert lines(found) == lines(exact)


@pytest.mark.usefixtures("ray_session")
def test_an_audio_file_is_embedded_as_the_store_was(
    undisturbed: tuple[Path, dict], store: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    reader = StoreReader.open(Storage(), str(copy))
    save_test_model(tmp_path / "model", reader.extractor_id, reader.states("t006.wav").shape[1])
    run_embed(EmbedRecipe(store=str(copy), model=str(tmp_path / "model")))
    audio = undisturbed[0].parent / "audio" / "t006.wav"
    code, output = call_wealy("search", copy, audio, "--top", "3")
    assert code == 0, output
    (embedder,) = list_embedders(Storage(), reader.root)
    assert f"by embedding {embedder}, among 40 tracks (exact)" in output
    assert lines(output)[0] == ["1", "1.000", "t006.wav"]
    # the store has all that a query needs
    shutil.rmtree(tmp_path / "model")
    moved = shutil.move(copy, tmp_path / "elsewhere")
    code, again = call_wealy("search", moved, audio, "--top", "3")
    assert code == 0, again
    assert lines(again) == lines(output)
    found = lines(output)

    _embed_otherwise(reader.extractor_id, moved, tmp_path / "model", release=False)
    code, newest = call_wealy("search", moved, "t006.wav")
    assert code == 0, newest
    assert f"by embedding {embedder}, among 39 tracks" in newest
    _embed_otherwise(reader.extractor_id, moved, tmp_path / "model")  # nothing to do but to release
    code, newest = call_wealy("search", moved, "t006.wav")
    assert code == 0, newest
    assert f"by embedding {embedder}" not in newest
    code, chosen = call_wealy("search", moved, "t006.wav", "--embedder-id", embedder)
    assert code == 0, chosen
    assert f"by embedding {embedder}, among 39 tracks" in chosen
    code, output = call_wealy("search", moved, "t006.wav", "--embedder-id", "nothing")
    assert code == 6, output
    assert f"has no embeddings 'nothing'; it has {min(list_embedders(Storage(), _root(moved)))}" in output
    assert "as they are now" not in chosen + newest

    kept = next(Path(moved).glob(f"*/embeddings/{embedder}/model/config.json"))
    kept.unlink()
    code, output = call_wealy("search", moved, audio, "--embedder-id", embedder)
    assert code == 6, output
    assert "there is no model at" in output
    assert "`wealy embed` puts it there again" in output
    (tmp_path / "model" / "README.md").unlink()  # for people only
    run_embed(EmbedRecipe(store=str(moved), model=str(tmp_path / "model")))
    code, again = call_wealy("search", moved, audio, "--top", "3", "--embedder-id", embedder)
    assert code == 0, again
    assert lines(again) == found


def _root(store: Path) -> str:
    return StoreReader.open(Storage(), str(store)).root


def _embed_otherwise(extractor_id: str, store: Path, model: Path, *, release: bool = True) -> None:
    dim = StoreReader.open(Storage(), str(store)).states("t006.wav").shape[1]
    save_test_model(model, extractor_id, dim)
    settings = {"store": str(store), "model": str(model), "windows": {"mode": "single"}, "release": release}
    run_embed(EmbedRecipe.model_validate(settings))


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("nothing.mp3",), 2, "'nothing.mp3' is neither a track of index"),
        (("t006.wav", "--by", "magic"), 2, "nothing can be compared by 'magic'; there are"),
        (("t006.wav", "--top", "0"), 2, "--top must be at least 1"),
        (("t006.wav", "--approximate", "x"), 2, "add --by avg_embedding"),
        (("t006.wav", "--by", "embedding"), 2, "has no released embeddings: `wealy embed` makes them"),
        (("la la", "--text", "--by", "avg_embedding"), 2, "the query has no states"),
        (("...", "--text"), 2, "the query has no words that could be compared by tfidf_characters\n"),
    ],
)
def test_bad_queries_are_one_sentence(store: Path, arguments: tuple, code: int, sentence: str) -> None:
    found, output = call_wealy("search", store, *arguments)
    assert found == code, output
    assert sentence in output
    assert "Traceback" not in output


def test_an_unusable_file_or_other_weights_are_refused(
    undisturbed: tuple[Path, dict], store: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.mp3"
    text.write_text("no audio")
    code, output = call_wealy("search", store, text)
    assert code == 2, output
    assert "text.mp3 cannot be used as a query" in output
    audio = undisturbed[0].parent / "audio" / "t006.wav"
    weights = tmp_path / "other.pt"
    model = tiny_model()
    model.decoder.ln.weight.mul_(2)
    torch.save({"dims": vars(model.dims), "model_state_dict": model.state_dict()}, weights)
    code, output = call_wealy("search", store, audio, "--model", weights)
    assert code == 5, output
    assert "are not those that the store's states were computed with" in output
    code, output = call_wealy("search", store, audio, "--model", tmp_path / "none")
    assert code == 5, output
    assert "none: no such file or folder" in output
    assert "say with --model where the weights of the store are here" in output
