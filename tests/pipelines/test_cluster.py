"""Jobs on clusters: `ray job submit` to a real head, and a node that dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.support import (
    REPOSITORY,
    contents,
    environment,
    make_tracks,
    recipe_settings,
    run_wealy,
    shards,
    start_wealy,
    wait_for,
    write_recipe,
)
from tests.s3_server import S3Server
from wealy_ray.storage import join

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def head(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Dashboard address of a Ray head that was started as a user does; it knows the S3 server."""
    dashboard, gcs = free_port(), free_port()
    with tempfile.TemporaryDirectory(
        prefix="wr", ignore_cleanup_errors=True
    ) as temp:  # socket paths must be short
        # Ray 2.60 cannot give a job its runtime environment when the path of its own Python has a space in it
        Path(temp, "env").symlink_to(sys.prefix)
        binaries = f"{temp}/env/bin"
        process = subprocess.Popen(
            [
                *(f"{binaries}/python", "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *(f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=8"),
                *(f"--temp-dir={temp}/ray", "--disable-usage-stats"),
                # the default ports may belong to another Ray on this machine
                *(f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"),
            ],
            env=environment(**s3.env(), PATH=f"{binaries}:{os.environ['PATH']}"),
            cwd=tmp_path_factory.mktemp("head"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_until_it_answers(f"{address}/api/jobs/", process)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "the head ended"
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                json.load(answer)
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError("the head does not answer")


def submit(head: str, recipe: Path, *overrides: str) -> tuple[int, str]:
    """As the README says it, from the repository's folder."""
    job = ["python", "jobs/extract.py", str(recipe), *overrides]
    for _ in range(60):
        done = subprocess.run(
            [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--", *job],
            cwd=REPOSITORY,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        # the head answers a little earlier than it can take jobs
        if "No available agent to submit job" not in done.stdout:
            break
        time.sleep(1)
    return done.returncode, done.stdout


def test_job_submit_on_s3(head: str, s3: S3Server, tmp_path: Path) -> None:
    make_tracks(tmp_path / "audio", 8)
    bucket = s3.bucket("jobs")
    for path in sorted((tmp_path / "audio").iterdir()):
        s3.storage().write(join(bucket, "audio", path.name), path.read_bytes())
    assert (
        run_wealy("manifest", join(bucket, "audio"), "--out", join(bucket, "m.parquet"), env=s3.env())[0] == 0
    )
    settings = recipe_settings(join(bucket, "m.parquet"), join(bucket, "store"))
    recipe = write_recipe(tmp_path / "recipe.yaml", settings)
    code, output = submit(head, recipe)
    assert code == 0, output
    assert "8/8 tracks (100.0 %)" in output  # our progress lines reach the submitter
    assert "8 = 8 ok + 0 failed" in output
    assert len(contents(join(bucket, "store"), s3.storage())) == 8

    code, output = submit(head, recipe, "no_such_key=1")
    assert code == 1, output
    assert f"error: recipe {recipe}: unknown key 'no_such_key'" in output


@pytest.mark.heavy
def test_killed_raylet_loses_nothing(undisturbed: tuple[Path, dict], tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    manifest, expected = undisturbed
    resources = {
        "tracks_per_block": 4,
        "tracks_per_shard": 4,
        "engine_gpus": 0,
        "engine_min": 2,
        "engine_max": 2,
    }
    store = tmp_path / "store"
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_settings(manifest, store, resources=resources))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
        try:
            victim = cluster.add_node(num_cpus=4)
            process = start_wealy("extract", recipe, env={"RAY_ADDRESS": cluster.address})
            assert wait_for(lambda: len(shards(store)) >= 3, process)
            cluster.remove_node(victim, allow_graceful=False)
            output, _ = process.communicate(timeout=240)
            # the run goes on, or ends as resumable: either way the same command finishes it
            assert process.returncode in (0, 75), output
            if process.returncode == 75:
                code, output = run_wealy("extract", recipe, env={"RAY_ADDRESS": cluster.address})
                assert code == 0, output
        finally:
            cluster.shutdown()
    assert contents(store) == expected
