"""`wealy embed`: every track once, killed in any way the same bits, and what evaluation and search make of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.pipelines.support import (
    call_wealy,
    run_wealy,
    save_test_model,
    start_wealy,
    wait_for,
    write_recipe,
)
from tests.s3_server import S3Server
from tests.store.songs import DIM, make_song_store
from tests.store.tracks import EXTRACTOR_ID, make_failed, make_track, write
from wealy_ray.errors import ConfigError, FencedError, StoreError, TooManyFailuresError
from wealy_ray.model import digest_of, load_model, save_model
from wealy_ray.model.recipe import EmbedRecipe
from wealy_ray.pipelines.embed import prepare, run_embed
from wealy_ray.pipelines.embed_stage import groups_of
from wealy_ray.pipelines.evaluate import run_evaluate
from wealy_ray.pipelines.search import run_search
from wealy_ray.report.status import store_status
from wealy_ray.retrieval.embedded import StoreVectors
from wealy_ray.retrieval.imports import PackedVectors, write_embeddings
from wealy_ray.retrieval.recipe import EvaluateRecipe
from wealy_ray.storage import Storage, join
from wealy_ray.store import (
    EmbeddingReader,
    IndexWriter,
    StoreReader,
    list_embedders,
    read_latest,
    released_embeddings,
)

CROP, STRIDE = 40, 1
TEXT = 2


def add_to_store(store: Path, *tracks: Any) -> None:
    root = join(str(store), EXTRACTOR_ID)
    writer = IndexWriter.claim(Storage(), root, manifest_digest="0" * 64, run_id="more")
    writer.publish(write(Storage(), root, tracks))


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest, a store of 60 good tracks, a failed one and one without text, and a model of its states."""
    folder = tmp_path_factory.mktemp("embed")
    make_song_store(str(folder), Storage())
    add_to_store(folder / "store", make_track(950, num_states=9, dim=DIM, kind=np.ones(9, np.int8)))
    save_test_model(folder / "model", EXTRACTOR_ID, DIM, crop=CROP, kinds=("text",))
    return folder


def settings_of(songs: Path, store: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "store": str(store),
        "model": str(songs / "model"),
        "windows": {"stride": STRIDE},
        # one window at a time: slow enough to be killed meanwhile
        "resources": {"gpus": 0, "states_per_pass": 1, "tracks_per_shard": 4},
        "publish_every_s": 0.1,
        "progress_every_s": 1,
        "lease_s": 3,
    }
    return settings | changes


def copy_of(songs: Path, folder: Path) -> Path:
    """The store without embeddings."""
    shutil.copytree(songs / "store", folder / "store", ignore=shutil.ignore_patterns("embeddings"))
    return folder / "store"


def contents(store: Path | str, storage: Storage | None = None) -> dict[str, tuple[Any, ...]]:
    """Everything that the embeddings say of each track, verified."""
    storage, root = storage or Storage(), join(str(store), EXTRACTOR_ID)
    ids = list(list_embedders(storage, root))
    if not ids or read_latest(storage, join(root, "embeddings", ids[0])) is None:
        return {}
    (reader,) = [EmbeddingReader.open(storage, join(root, "embeddings", name)) for name in ids]
    names = ("track_id", "status", "error_type", "source_checksum", "num_states", "num_windows", "dim")
    rows = reader.index.table.select(names).to_pylist()
    found = dict(reader.tracks())
    return {
        row["track_id"]: (*row.values(), found.pop(row["track_id"], np.zeros(0)).tobytes()) for row in rows
    }


def shards(store: Path) -> list[Path]:
    return sorted(store.glob("*/embeddings/*/shards/*.parquet"))


@pytest.fixture(scope="module")
def undisturbed(songs: Path) -> dict[str, tuple[Any, ...]]:
    code, output = run_wealy("embed", write_recipe(songs / "r.yaml", settings_of(songs, songs / "store")))
    assert code == 0, output
    assert "tracks    62 = 60 ok + 2 failed" in output, output
    assert "failures  extraction_failed 1, no_states 1" in output
    assert "62/62 tracks (100.0 %)" in output
    found = contents(songs / "store")
    assert len(found) == 62
    (record,) = (songs / "store").glob("*/embeddings/*/runs/*/run.json")
    facts = json.loads(record.read_text())
    assert (facts["outcome"], facts["ok"], facts["failed"], facts["tracks"]) == ("done", 60, 2, 62)
    return found


def test_vectors_are_those_of_one_window_at_a_time(songs: Path, undisturbed: dict) -> None:
    reader = StoreReader.open(Storage(), str(songs / "store"))
    network = load_model(str(songs / "model")).network
    for track_id in ("set:V-0", "set:V-7", "set:V-42"):
        states = torch.from_numpy(reader.states(track_id)[reader.kinds(track_id) == TEXT]).float()
        starts = range(max(1, len(states) - CROP + 1))
        expected = [
            network(states[None, s : s + CROP], torch.tensor([len(states[s : s + CROP])])) for s in starts
        ]
        found = np.frombuffer(undisturbed[track_id][-1], np.float32).reshape(-1, 8)
        np.testing.assert_allclose(found, torch.cat(expected).numpy(), atol=1e-5)
        assert undisturbed[track_id][1:6] == (
            "ok",
            None,
            reader.index.row(track_id)["checksum"],
            len(states),
            len(starts),
        )
    assert undisturbed["set:V-900"][1:3] == ("failed", "extraction_failed")
    assert undisturbed["set:V-950"][1:3] == ("failed", "no_states")


@pytest.mark.usefixtures("undisturbed")
def test_a_second_run_has_nothing_to_do(songs: Path) -> None:
    before = shards(songs / "store")
    code, output = call_wealy("embed", songs / "r.yaml")
    assert code == 0, output
    assert "nothing was left to do" in output
    assert shards(songs / "store") == before
    status = store_status(Storage(), str(songs / "store"))
    assert "62 tracks = 60 ok + 2 failed" in status
    digest = load_model(str(songs / "model")).config.digest
    assert f"model {digest[:8]}, windows of {CROP} states every 1, written by run" in status
    assert re.search(r"release 1: embeddings \w{16} as of index \d+, of states as of index \d+", status), (
        status
    )


@pytest.mark.usefixtures("ray_session")
def test_shards_that_are_gone_are_made_again(
    songs: Path, undisturbed: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(songs / "store", tmp_path / "store")
    store = tmp_path / "store"
    reader = released_embeddings(Storage(), str(store), EXTRACTOR_ID)
    assert reader is not None
    # in the order in which they are read
    names = dict.fromkeys(reader.ok["shard"].to_pylist())
    gone, damaged, *_ = (Path(reader.root, "shards", name) for name in names)
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="is gone: `wealy embed` makes it again"):
        contents(store)
    assert re.search(r"\d+ tracks are to be embedded", store_status(Storage(), str(store)))
    run_embed(EmbedRecipe.model_validate(settings_of(songs, store)))
    assert re.search(r"\d+ tracks lie in shards that are gone: they are worked on again", caplog.text)
    with pytest.raises(StoreError, match="remove it, and `wealy embed` makes it again"):
        contents(store)
    damaged.unlink()
    run_embed(EmbedRecipe.model_validate(settings_of(songs, store)))
    assert contents(store) == undisturbed


@pytest.mark.heavy
@pytest.mark.usefixtures("ray_session")
def test_a_killed_driver_leaves_the_same_bits(songs: Path, undisturbed: dict, tmp_path: Path) -> None:
    store = copy_of(songs, tmp_path)
    lazy = write_recipe(tmp_path / "lazy.yaml", settings_of(songs, store, publish_every_s=1000))

    def written(number: int) -> Callable[[], bool]:
        return lambda: len(shards(store)) >= number

    process = start_wealy("embed", lazy)
    assert wait_for(written(2), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert contents(store) == {}, "no index should name the shards yet"
    # a job that is stopped politely publishes first
    process = start_wealy("embed", lazy)
    assert wait_for(written(len(shards(store)) + 3), process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "adopted" in output
    part = contents(store)
    assert 12 <= len(part) < len(undisturbed)
    summary = run_embed(EmbedRecipe.model_validate(settings_of(songs, store)))
    assert (summary.done_before, summary.ok, summary.failed) == (len(part), 60, 2)
    assert contents(store) == undisturbed


def test_a_killed_worker_is_replaced(songs: Path, undisturbed: dict, tmp_path: Path) -> None:
    store = copy_of(songs, tmp_path)
    process = start_wealy("embed", write_recipe(tmp_path / "r.yaml", settings_of(songs, store)))
    assert wait_for(lambda: len(shards(store)) >= 2, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "EmbedStage" in " ".join(_command(child))
    ]
    assert workers, "no worker found to kill"
    for worker in workers:
        worker.kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert contents(store) == undisturbed


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # a process that ends while we look
        return []


@pytest.mark.heavy
def test_two_workers_on_a_bucket_leave_the_same_bits(
    songs: Path, undisturbed: dict, s3: S3Server, tmp_path: Path
) -> None:
    bucket = s3.bucket("embed")
    for name in ("store", "model"):
        for path in (songs / name).rglob("*"):
            if path.is_file() and "embeddings" not in path.parts:
                s3.storage().write(join(bucket, str(path.relative_to(songs))), path.read_bytes())
    settings = settings_of(songs, join(bucket, "store"), model=join(bucket, "model"))
    settings["resources"] |= {"workers": 2}
    code, output = run_wealy("embed", write_recipe(tmp_path / "r.yaml", settings), env=s3.env())
    assert code == 0, output
    assert contents(join(bucket, "store"), s3.storage()) == undisturbed


@pytest.mark.usefixtures("ray_session")
def test_only_states_that_changed_are_embedded_again(
    songs: Path, undisturbed: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(songs / "store", tmp_path / "store")
    store = tmp_path / "store"
    kind = np.full(50, TEXT, np.int8)
    add_to_store(
        store,
        make_track(5, num_states=50, dim=DIM, kind=kind),
        make_track(900, num_states=50, dim=DIM, kind=kind),
        make_failed(2000),
    )
    assert "3 tracks are to be embedded" in store_status(Storage(), str(store))
    run_search(Storage(), str(store), "set:V-0")
    assert "3 tracks have no vectors of their states as they are now; `wealy embed` makes them" in caplog.text
    of = {"manifest": str(songs / "manifest.parquet"), "store": str(store), "out": str(tmp_path / "out")}
    of |= {"systems": [{"kind": "embeddings", "name": "W"}], "split": "train"}
    metrics = run_evaluate(EvaluateRecipe.model_validate(of)).metrics
    assert "W: 3 tracks have no vectors of their states as they are now" in caplog.text
    # of the tracks that are compared: the third is not in the manifest
    assert {s["name"]: s["outdated"] for s in metrics["systems"]} == {"random": 0, "same language": 0, "W": 2}
    before = set(shards(store))
    summary = run_embed(EmbedRecipe.model_validate(settings_of(songs, store)))
    assert (summary.tracks, summary.ok, summary.failed) == (63, 61, 2)
    assert (summary.done_before, summary.work_tracks) == (60, 3)
    assert len(set(shards(store)) - before) == 3  # three groups
    found = contents(store)
    assert len(found) == 63
    changed = {track_id for track_id, row in found.items() if row != undisturbed.get(track_id)}
    assert changed == {"set:V-5", "set:V-900", "set:V-2000"}


def test_what_cannot_be_embedded_is_one_sentence(songs: Path, tmp_path: Path) -> None:
    store = copy_of(songs, tmp_path)
    save_test_model(tmp_path / "foreign", "fedcba9876543210", DIM)
    recipe = write_recipe(tmp_path / "r.yaml", settings_of(songs, store, model=str(tmp_path / "foreign")))
    code, output = call_wealy("embed", recipe)
    assert code == 6, output
    assert "error: this model was trained on states of extractor fedcba9876543210, these are of" in output
    with pytest.raises(StoreError, match="there is no model at"):
        run_embed(EmbedRecipe(store=str(store), model=str(tmp_path / "none")))
    with pytest.raises(StoreError, match="there is no store at"):
        run_embed(EmbedRecipe(store=str(tmp_path / "none"), model=str(songs / "model")))
    assert not list(store.glob("*/embeddings/*"))


def test_the_embedder_is_what_its_network_computes(songs: Path, tmp_path: Path) -> None:
    """Heads leave no trace in the weights."""
    model = load_model(str(songs / "model"))
    settings = model.config.model.model_copy(update={"heads": 4})
    digest = digest_of(model.network.state_dict(), settings)
    config = model.config.model_copy(update={"model": settings, "digest": digest})
    save_model(Storage(), str(tmp_path / "model"), model.network, config, "# Other heads\n")
    recipe = EmbedRecipe.model_validate(settings_of(songs, songs / "store"))
    other = recipe.model_copy(update={"model": str(tmp_path / "model")})
    assert prepare(other).spec.embedder_id != prepare(recipe).spec.embedder_id


@pytest.mark.usefixtures("ray_session")
def test_states_that_are_gone_end_the_run_with_their_shard(songs: Path, tmp_path: Path) -> None:
    store = copy_of(songs, tmp_path)
    for shard in store.glob("*/shards/*.parquet"):
        shard.unlink()
    with pytest.raises(StoreError, match=r"the shard .*\.parquet of track 'set:V-\d+' is gone"):
        run_embed(EmbedRecipe.model_validate(settings_of(songs, store)))
    (record,) = store.glob("*/embeddings/*/runs/*/run.json")
    facts = json.loads(record.read_text())
    assert (facts["outcome"], facts["exit_code"]) == ("StoreError", 6)


@pytest.mark.usefixtures("ray_session")
def test_a_broken_model_is_not_taken_for_success(songs: Path, tmp_path: Path) -> None:
    store = copy_of(songs, tmp_path)
    model = load_model(str(songs / "model"))
    with torch.no_grad():
        next(iter(model.network.parameters())).fill_(torch.nan)
    config = model.config.model_copy(
        update={"digest": digest_of(model.network.state_dict(), model.config.model)}
    )
    save_model(Storage(), str(tmp_path / "nan"), model.network, config, "# NaN\n")
    recipe = settings_of(songs, store, model=str(tmp_path / "nan"), windows={"mode": "single"})
    with pytest.raises(TooManyFailuresError, match="the vectors of 60 of 62 tracks are NaN or infinite"):
        run_embed(EmbedRecipe.model_validate(recipe))


def test_the_driver_that_claimed_last_goes_on(songs: Path, tmp_path: Path) -> None:
    recipe = EmbedRecipe.model_validate(settings_of(songs, copy_of(songs, tmp_path)))
    one, two = prepare(recipe).ledger(), prepare(recipe).ledger()
    one.claim("one")
    two.claim("two")
    with pytest.raises(FencedError):
        one.reconciled()
    assert two.remaining().num_rows == 62


def test_groups_do_not_depend_on_what_is_left(songs: Path) -> None:
    wanted = StoreReader.open(Storage(), str(songs / "store")).index.table
    whole = [group["track_id"].to_pylist() for group in groups_of(wanted, wanted, 8)]
    assert [len(group) for group in whole] == [8] * 7 + [6]
    left = wanted.filter(np.isin(wanted["track_id"].to_pylist(), whole[1] + whole[4][3:]))
    assert [g["track_id"].to_pylist() for g in groups_of(wanted, left, 8)] == [whole[1], whole[4][3:]]


@pytest.mark.usefixtures("undisturbed", "ray_session")
def test_the_evaluation_takes_the_store_s_embeddings(songs: Path, tmp_path: Path) -> None:
    packed = PackedVectors.of(StoreVectors.open(Storage(), join(str(songs / "store"), EXTRACTOR_ID), None))
    write_embeddings(Storage(), str(tmp_path / "same.parquet"), packed, {})
    more = {"kind": "embeddings", "reduction": "bpwr-3"}
    recipe = {
        "manifest": str(songs / "manifest.parquet"),
        "store": str(songs / "store"),
        "out": str(tmp_path / "out"),
        "systems": [
            {**more, "name": "store"},
            {**more, "name": "file", "uri": str(tmp_path / "same.parquet")},
        ],
    }
    nothing = recipe | {"systems": [{**more, "name": "none", "embedder_id": "none"}]}
    with pytest.raises(StoreError, match="has no embeddings 'none'; it has"):
        run_evaluate(EvaluateRecipe.model_validate(nothing))
    for held_gib in (4, 0):  # from memory, and from tiles
        place = {"out": str(tmp_path / f"out{held_gib}"), "resources": {"held_gib": held_gib}}
        metrics = run_evaluate(EvaluateRecipe.model_validate(recipe | place)).metrics
        found = {system["name"]: system for system in metrics["systems"]}
        assert found["store"]["views"] == found["file"]["views"]
        assert found["store"]["facts"]["network"] == "transformer"
        assert found["store"]["outdated"] == found["file"]["outdated"] == 0
        assert found["store"]["views"]["all"]["map"]["mean"] > found["random"]["views"]["all"]["map"]["mean"]


@pytest.mark.usefixtures("undisturbed")
def test_search_goes_by_the_released_embeddings(
    songs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = str(songs / "store")
    by_vectors = run_search(Storage(), store, "set:V-3", top=4)
    assert by_vectors.by.startswith("embedding ")
    assert by_vectors.num_tracks == 59
    assert len(by_vectors.found) == 4
    assert run_search(Storage(), store, "set:V-3", top=4, by="avg_embedding").by == "avg_embedding"
    with pytest.raises(ConfigError, match="no words that could be compared by tfidf_characters"):
        run_search(Storage(), store, "la la", is_text=True)
    with pytest.raises(ConfigError, match="a text has no states"):
        run_search(Storage(), store, "la la", is_text=True, by="embedding")
    # states that are newer than their vectors are embedded for the query
    copy = tmp_path / "store"
    shutil.copytree(songs / "store", copy)
    shutil.move(copy / "releases", tmp_path / "releases")
    with pytest.raises(ConfigError, match="has no released embeddings"):
        run_search(Storage(), str(copy), "set:V-3", by="embedding")
    assert "the store's embeddings are not released; `wealy embed` does so" in caplog.text
    shutil.move(tmp_path / "releases", copy / "releases")
    reader = StoreReader.open(Storage(), store)
    twin = reader.track("set:V-8")
    add_to_store(copy, make_track(3, twin.num_states, DIM, kind=twin.kind, states=twin.states))
    nearest = run_search(Storage(), str(copy), "set:V-3").found[0]
    assert nearest.track_id == "set:V-8"
    assert nearest.score == pytest.approx(1, abs=1e-5)
