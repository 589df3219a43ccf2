"""Training by Ray Train: killed in every way it ends with the same bits; what cannot be trained is one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.pipelines.support import call_wealy, run_wealy, start_wealy, wait_for, write_recipe
from tests.s3_server import S3Server
from tests.store.songs import make_song_store
from wealy_ray.catalog import read_manifest, write_manifest
from wealy_ray.errors import ClusterError, ManifestError, StoreError, TrainingError
from wealy_ray.model import load_model
from wealy_ray.storage import Storage, join
from wealy_ray.training.recipe import TrainRecipe

EPOCHS = 120
MODEL = {
    "kind": "transformer",
    "width": 16,
    "layers": 1,
    "heads": 2,
    "feed_forward": 16,
    "output_dim": 8,
    "standardise": True,
}


def settings_of(place: str | Path, out: str | Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "manifest": join(str(place), "manifest.parquet"),
        "store": join(str(place), "store"),
        "out": str(out),
        "model": MODEL,
        "data": {"crop": 40, "cliques_per_batch": 6, "kinds": ["text"]},
        "optimiser": {"learning_rate": 1e-3, "epochs": EPOCHS, "warmup_epochs": 1},
        "validation": {"every_epochs": 5, "patience": 1000},
        "mining": {"every_epochs": 20, "neighbours": 4},
        "resources": {"workers": 2, "passes": 4, "loaders": 0},
        "checkpoint_every_s": 0.5,
        "progress_every_s": 1,
        "lease_s": 3,
    }
    return settings | changes


@pytest.fixture(scope="session")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("songs")
    make_song_store(str(folder), Storage())
    return folder


@pytest.fixture(scope="session")
def undisturbed(songs: Path) -> tuple[str, list[dict[str, float]]]:
    """Digest of the model and history of a run that nobody disturbed."""
    recipe = write_recipe(songs / "recipe.yaml", settings_of(songs, songs / "out"))
    code, output = run_wealy("train", recipe)
    assert code == 0, output
    assert "train       42 tracks, 14 cliques; 2 tracks without states" in output
    assert re.search(r"epoch \d+/120 done, loss \d\.\d+, MAP 0\.\d+", output), output
    assert re.search(r"best +validation MAP 0\.\d{4} after epoch \d+", output), output
    found = outcome(songs / "out")
    assert [entry["epoch"] for entry in found[1]] == list(range(1, EPOCHS + 1))
    record = json.loads((songs / "out" / "run.json").read_text())
    assert (record["outcome"], record["workers"], record["epochs"]) == ("done", 2, EPOCHS)
    assert record["counts"]["train"] == {"tracks": 42, "cliques": 14, "dropped": 2}
    assert list((songs / "out" / "tensorboard").iterdir())
    return found


def outcome(out: Path) -> tuple[str, list[dict[str, float]]]:
    return load_model(str(out / "model")).config.digest, json.loads((out / "history.json").read_text())


def checkpoints(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.glob("checkpoints/*/facts.json"))


def after(out: Path, epoch: int) -> Callable[[], bool]:
    return lambda: any(int(name[:5]) >= epoch for name in checkpoints(out))


def test_a_second_run_has_nothing_to_do(songs: Path, undisturbed: tuple[str, list]) -> None:
    code, output = call_wealy("train", songs / "recipe.yaml")
    assert code == 0, output
    assert "nothing was left to do" in output
    assert outcome(songs / "out") == undisturbed


def test_a_killed_worker_costs_what_came_after_the_checkpoint(
    songs: Path, undisturbed: tuple[str, list], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start_wealy("train", write_recipe(tmp_path / "recipe.yaml", settings_of(songs, out)))
    assert wait_for(after(out, 10), process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(_command(child))
    ]
    assert len(workers) == 2
    workers[1].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert outcome(out) == undisturbed


@pytest.mark.heavy
def test_a_killed_and_a_stopped_driver_are_gone_on_from(
    songs: Path, undisturbed: tuple[str, list], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "recipe.yaml", settings_of(songs, out))
    process = start_wealy("train", recipe)
    assert wait_for(after(out, 5), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "model").exists()
    process = start_wealy("train", recipe)
    assert process.stdout is not None
    assert next(line for line in process.stdout if line.startswith("epoch"))
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "the workers save first" in output
    assert "have not saved" not in output
    assert json.loads((out / "run.json").read_text())["outcome"] == "KeyboardInterrupt"
    code, output = run_wealy("train", recipe)
    assert code == 0, output
    assert outcome(out) == undisturbed


@pytest.mark.heavy
def test_a_stopped_driver_waits_until_its_workers_have_saved(songs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    never = {"validation": {"every_epochs": 5000}, "checkpoint_every_s": 1000}  # nothing else saves
    optimiser = {"learning_rate": 1e-3, "epochs": 5000, "warmup_epochs": 1}
    recipe = write_recipe(tmp_path / "recipe.yaml", settings_of(songs, out, optimiser=optimiser, **never))
    process = start_wealy("train", recipe)
    assert process.stdout is not None
    assert next(line for line in process.stdout if re.match(r"epoch \d+/5000 done", line))
    assert checkpoints(out) == []
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert len(checkpoints(out)) == 1, output


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # a process that ends while we look
        return []


def run(settings: dict[str, Any]) -> Any:
    from wealy_ray.pipelines.train import run_train

    return run_train(TrainRecipe.model_validate(settings))


@pytest.mark.heavy
def test_one_worker_on_s3_trains_the_same_but_for_rounding(
    songs: Path, s3: S3Server, undisturbed: tuple[str, list], tmp_path: Path
) -> None:
    out = join(s3.bucket("training"), "out")
    settings = settings_of(
        songs, out, resources={"workers": 1, "passes": 4, "loaders": 1}, validation={"patience": 2}
    )
    code, output = run_wealy("train", write_recipe(tmp_path / "recipe.yaml", settings), env=s3.env())
    assert code == 0, output
    found = json.loads(s3.storage().read(join(out, "history.json")))
    assert len(found) >= 15
    for ours, theirs in zip(found[:10], undisturbed[1][:10], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
        assert ours.get("map") == pytest.approx(theirs.get("map"), abs=0.02)
    assert load_model(join(out, "model"), s3.storage()).config.data["train"]["tracks"] == 42
    names = {info.uri.removeprefix(out + "/").split("/")[0] for info in s3.storage().list(out)}
    assert names == {"checkpoints", "history.json", "model", "run.json", "tensorboard", "training.json"}


@pytest.mark.heavy
def test_an_elastic_group_goes_on_with_fewer_when_a_node_is_lost(
    songs: Path, undisturbed: tuple[str, list], tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    out = tmp_path / "out"
    elastic = settings_of(songs, out, resources={"workers": [1, 2], "passes": 4, "loaders": 0})
    recipe = write_recipe(tmp_path / "recipe.yaml", elastic)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            victim = cluster.add_node(num_cpus=1)
            process = start_wealy("train", recipe, env={"RAY_ADDRESS": cluster.address})
            assert wait_for(after(out, 8), process)
            cluster.remove_node(victim, allow_graceful=False)
            output, _ = process.communicate(timeout=400)
        finally:
            cluster.shutdown()
    assert process.returncode == 0, output
    assert "on 1 worker," in output
    found = outcome(out)[1]
    assert [entry["epoch"] for entry in found] == list(range(1, EPOCHS + 1))
    for ours, theirs in zip(found, undisturbed[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)


@pytest.mark.heavy
def test_a_node_that_will_be_taken_away_costs_nothing(songs: Path, tmp_path: Path) -> None:
    """Its workers save at the notice, and a node that joined goes on from there."""
    from ray.cluster_utils import Cluster

    out = tmp_path / "out"
    epochs = 1200  # half a minute
    changes = {
        "checkpoint_every_s": 10_000,
        "validation": {"every_epochs": epochs},
        "optimiser": {"learning_rate": 1e-3, "epochs": epochs, "warmup_epochs": 1},
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", settings_of(songs, out, **changes))
    quiet = write_recipe(tmp_path / "quiet.yaml", settings_of(songs, tmp_path / "quiet", **changes))
    code, output = run_wealy("train", quiet)
    assert code == 0, output
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            victim = cluster.add_node(num_cpus=1)
            process = start_wealy("train", recipe, env={"RAY_ADDRESS": cluster.address})
            assert process.stdout is not None
            assert any(line.startswith("epoch ") for line in process.stdout)  # reads as far as that
            cluster.add_node(num_cpus=1)
            drain = ("drain-node", f"--address={cluster.address}", f"--node-id={victim.node_id}")
            why = (
                "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=spot",
                "--deadline-remaining-seconds=20",
            )
            subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain, *why], check=True)
            assert wait_for(lambda: bool(checkpoints(out)), process), "nothing was saved at the notice"
            (saved,) = checkpoints(out)
            cluster.remove_node(victim, allow_graceful=False)
            output, _ = process.communicate(timeout=400)
        finally:
            cluster.shutdown()
    assert process.returncode == 0, output
    assert 0 < int(saved[:5]) < epochs
    assert "on 2 workers," in output
    assert outcome(out) == outcome(tmp_path / "quiet")


@pytest.mark.heavy
@pytest.mark.usefixtures("ray_session")
def test_a_fault_of_one_rank_ends_the_run_with_its_sentence(songs: Path, tmp_path: Path) -> None:
    nan = settings_of(songs, tmp_path / "nan", optimiser={"learning_rate": 1e30, "epochs": 9})
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch \d, step \d, with tracks set:V-\d+"):
        run(nan)
    record = json.loads((tmp_path / "nan" / "run.json").read_text())
    assert (record["outcome"], record["exit_code"]) == ("TrainingError", 11)

    shutil.copytree(songs / "store", tmp_path / "store")
    shards = list((tmp_path / "store").glob("*/shards/*.parquet"))
    for shard in shards:
        shard.unlink()
    broken = settings_of(songs, tmp_path / "broken", store=str(tmp_path / "store"))
    with pytest.raises(StoreError) as caught:
        run(broken)
    assert any(shard.name in str(caught.value) for shard in shards)


def test_what_cannot_be_trained_is_said_before_anything_is_written(songs: Path, tmp_path: Path) -> None:
    table = read_manifest(Storage(), str(songs / "manifest.parquet")).table
    alone = table.set_column(table.schema.get_field_index("clique_id"), "clique_id", table["track_id"])
    write_manifest(Storage(), str(tmp_path / "alone.parquet"), alone)
    out = tmp_path / "out"
    cases = [
        ({"manifest": str(tmp_path / "alone.parquet")}, ManifestError, "training needs at least two cliques"),
        (
            {"data": {"validation_split": "test"}},
            ManifestError,
            "has no track of split 'test'; it has train, val",
        ),
        ({"store": str(tmp_path / "nothing")}, StoreError, "nothing"),
        ({"resources": {"workers": 2, "gpus": 1, "passes": 4}}, ClusterError, "this machine has 0"),
        ({"extractor_id": "0" * 16}, StoreError, "0000000000000000"),
        (
            {"gather": "none", "resources": {"workers": 8, "passes": 8}},
            ManifestError,
            "each of 8 workers needs two cliques of its own to tell apart, a batch has 6",
        ),
    ]
    for changes, kind, words in cases:
        with pytest.raises(kind, match=re.escape(words)):
            run(settings_of(songs, out, **changes))
    assert not out.exists()


def test_the_folder_of_another_training_is_refused(songs: Path, undisturbed: tuple[str, list]) -> None:
    with pytest.raises(StoreError, match=r"is of another training: optimiser, seed differ; give this one"):
        run(settings_of(songs, songs / "out", seed=3, optimiser={"epochs": 7}))
    assert outcome(songs / "out") == undisturbed
