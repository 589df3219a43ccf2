"""Real states of the sample songs: extract -> train by two workers -> kill -> go on -> embed -> evaluate -> search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from tests.pipelines.support import (
    REPOSITORY,
    RUN_LIMIT_S,
    call_wealy,
    environment,
    recipe_settings,
    wait_for,
    write_recipe,
)
from tests.s3_server import DIE_WITH_PARENT
from wealy_ray.model import load_model

SONGS = REPOSITORY / "examples/songs"
SPLITS = {"s2w00": "train", "s2w07": "train", "s2w01": "val"}


def start_job(verb: str, recipe: Path, **env: str) -> subprocess.Popen[str]:
    """What `ray job submit` runs, from the repository's folder."""
    return subprocess.Popen(
        [sys.executable, "-c", DIE_WITH_PARENT, sys.executable, f"jobs/{verb}.py", str(recipe)],
        cwd=REPOSITORY,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_job(verb: str, recipe: Path) -> str:
    """As on a cluster: in a Ray session that is there already, which saves the start of another one."""
    job = start_job(verb, recipe, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    try:
        output, _ = job.communicate(timeout=RUN_LIMIT_S)
    finally:
        job.kill()
    assert job.returncode == 0, output
    return output


@pytest.mark.usefixtures("ray_session")
def test_from_songs_to_a_trained_model_s_table(whisper_base: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (SONGS / "manifest.jsonl").read_text().splitlines()]
    chosen = [row | {"split": SPLITS[row["lyrics_id"]]} for row in rows if row["lyrics_id"] in SPLITS]
    assert [row["split"] for row in chosen].count("train") == 6
    for row in chosen:
        row["path"] = str(SONGS / row["path"])
    (tmp_path / "songs.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    manifest = tmp_path / "manifest.parquet"
    columns = ("--column", "audio_uri=path", "--column", "clique_id=lyrics_id")
    code, output = call_wealy("manifest", tmp_path / "songs.jsonl", "--out", manifest, *columns)
    assert code == 0, output

    extract = recipe_settings(
        manifest,
        tmp_path / "store",
        model=str(whisper_base),
        decode={"max_tokens": 24},
        engine={"num_slots": 8, "num_threads": 2},
        resources={"tracks_per_block": 8, "tracks_per_shard": 4, "engine_gpus": 0},
    )
    code, output = call_wealy("extract", write_recipe(tmp_path / "extract.yaml", extract))
    assert code == 0, output
    assert "tracks     8 = 8 ok + 0 failed" in output

    out = tmp_path / "training"
    training = {
        "manifest": str(manifest),
        "store": str(tmp_path / "store"),
        "out": str(out),
        "model": {
            "kind": "transformer",
            "layers": 1,
            "width": 32,
            "heads": 2,
            "feed_forward": 32,
            "output_dim": 16,
            "standardise": True,
        },
        "data": {"kinds": ["text"], "cliques_per_batch": 2, "versions_per_clique": 3},
        "optimiser": {"epochs": 30, "warmup_epochs": 1, "learning_rate": 2e-3},
        "resources": {"workers": 2, "passes": 2, "loaders": 0},
        "checkpoint_every_s": 0.1,
    }
    recipe = write_recipe(tmp_path / "train.yaml", training)
    process = start_job("train", recipe)
    assert wait_for(lambda: any(out.glob("checkpoints/*/facts.json")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    code, output = call_wealy("train", recipe)
    assert code == 0, output
    assert "train       6 tracks, 2 cliques; 0 tracks without states" in output
    history = json.loads((out / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == list(range(1, 31))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert load_model(str(out / "model")).config.input_dim == 512

    embed = {"store": str(tmp_path / "store"), "model": str(out / "model"), "resources": {"gpus": 0}}
    output = run_job("embed", write_recipe(tmp_path / "embed.yaml", embed))
    assert "tracks   8 = 8 ok + 0 failed" in output
    evaluate = {
        "manifest": str(manifest),
        "store": str(tmp_path / "store"),
        "out": str(tmp_path / "evaluation"),
        "split": "train",
        "systems": [{"kind": "embeddings", "name": "WEALY"}, {"kind": "avg_embedding"}],
    }
    run_job("evaluate", write_recipe(tmp_path / "evaluate.yaml", evaluate))
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    systems = {system["name"]: system["views"]["all"] for system in metrics["systems"]}
    assert systems["WEALY"]["n"] == 6
    assert systems["WEALY"]["map"]["mean"] == 1.0  # of the works it was trained on
    code, output = call_wealy("search", tmp_path / "store", chosen[0]["track_id"], "--top", "2")
    assert code == 0, output
    assert chosen[0]["track_id"] not in output.splitlines()[1]
