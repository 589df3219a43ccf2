"""The whole pipeline on a real S3 server: same bits as on local disk, jobs, outages, wrong credentials."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.support import (
    REPOSITORY,
    contents,
    make_manifest,
    make_tracks,
    recipe_settings,
    run_wealy,
    start_wealy,
    wait_for,
    write_recipe,
)
from tests.s3_server import S3Server
from wealy_ray.storage import join

SONGS = ("s2t002.m4a", "s2t009.ogg")


def upload(s3: S3Server, folder: Path, bucket: str) -> str:
    prefix = join(s3.bucket(bucket), "audio")
    storage = s3.storage()
    for path in sorted(folder.iterdir()):
        storage.write(join(prefix, path.name), path.read_bytes())
    return prefix


def s3_settings(manifest: str, store: str, **changes: Any) -> dict[str, Any]:
    return recipe_settings(manifest, store, **{"storage": {"retry_for_s": 5}, **changes})


@pytest.mark.heavy
def test_same_states_from_s3_and_from_disk_with_real_weights(
    s3: S3Server, whisper_base: Path, tmp_path: Path
) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    for name in SONGS:
        shutil.copy(REPOSITORY / "examples/songs/audio" / name, audio)
    real = {
        "model": str(whisper_base),
        "decode": {"max_tokens": 20},
        "engine": {"num_slots": 4, "num_threads": 2},
        "resources": {"tracks_per_block": 2, "tracks_per_shard": 2, "engine_gpus": 0},
    }
    manifest = make_manifest(audio, tmp_path / "manifest.parquet")
    local = write_recipe(tmp_path / "local.yaml", recipe_settings(manifest, tmp_path / "store", **real))
    code, output = run_wealy("extract", local)
    assert code == 0, output
    assert "tracks     2 = 2 ok + 0 failed" in output

    # the same through S3, the manifest built from the bucket's listing
    prefix = upload(s3, audio, "songs")
    bucket = s3.bucket("songs")
    code, output = run_wealy("manifest", prefix, "--out", join(bucket, "manifest.parquet"), env=s3.env())
    assert (code, output) == (0, f"2 tracks written to {bucket}/manifest.parquet\n")
    remote = write_recipe(
        tmp_path / "remote.yaml", s3_settings(join(bucket, "manifest.parquet"), join(bucket, "store"), **real)
    )
    code, output = run_wealy("extract", remote, env=s3.env())
    assert code == 0, output
    on_disk = contents(tmp_path / "store")
    assert {row[0] for row in on_disk.values()} == {"ok"}
    assert all(row[2] > 20 for row in on_disk.values())
    assert contents(join(bucket, "store"), s3.storage()) == on_disk

    code, output = run_wealy("status", join(bucket, "store"), env=s3.env())
    assert code == 0
    assert "2 = 2 ok + 0 failed" in output
    (record,) = [
        info.uri for info in s3.storage().list(join(bucket, "store")) if info.uri.endswith("run.json")
    ]
    facts = json.loads(s3.storage().read(record))
    assert facts["outcome"] == "done"
    assert facts["ok"] == 2
    assert s3.admin[1] not in json.dumps(facts)


@pytest.mark.heavy
def test_outage_in_mid_run(s3_of_its_own: S3Server, tmp_path: Path) -> None:
    """The server is gone for a while: first longer than our patience, then shorter."""
    s3 = s3_of_its_own
    make_tracks(tmp_path / "audio", 24)
    prefix = upload(s3, tmp_path / "audio", "outage")
    bucket, store = s3.bucket("outage"), "s3://outage/store"
    assert run_wealy("manifest", prefix, "--out", join(bucket, "m.parquet"), env=s3.env())[0] == 0
    settings = s3_settings(join(bucket, "m.parquet"), store)
    impatient = write_recipe(tmp_path / "impatient.yaml", settings | {"storage": {"retry_for_s": 2}})
    patient = write_recipe(tmp_path / "patient.yaml", settings | {"storage": {"retry_for_s": 120}})

    def some_shards(least: int) -> bool:
        return sum("/shards/" in info.uri for info in s3.storage().list(store)) >= least

    process = start_wealy("extract", impatient, env=s3.env())
    assert wait_for(lambda: some_shards(2), process)
    s3.stop()
    output, _ = process.communicate(timeout=240)
    s3.start()
    assert process.returncode == 75, output
    assert "run the same command again" in output

    process = start_wealy("extract", patient, env=s3.env())
    assert wait_for(lambda: some_shards(4), process)
    s3.stop()
    time.sleep(2)
    s3.start()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    found = contents(store, s3.storage())
    assert len(found) == 24
    assert {row[0] for row in found.values()} == {"ok"}  # an outage is nobody's fault


def test_forbidden_and_missing_objects_fail_alone(s3: S3Server, tmp_path: Path) -> None:
    make_tracks(tmp_path / "audio", 3)
    readable = upload(s3, tmp_path / "audio", "limited")
    secret = upload(s3, tmp_path / "audio", "forbidden")
    rows = [
        {"track_id": "good", "audio_uri": join(readable, "t000.wav")},
        {"track_id": "forbidden", "audio_uri": join(secret, "t001.wav")},
        {"track_id": "missing", "audio_uri": join(readable, "nothing.wav")},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # made with the right to see everything, run without it
    code, output = run_wealy("manifest", source, "--out", tmp_path / "m.parquet", env=s3.env())
    assert code == 0, output
    settings = s3_settings(str(tmp_path / "m.parquet"), str(tmp_path / "store"), max_failure_rate=0.5)
    code, output = run_wealy(
        "extract", write_recipe(tmp_path / "recipe.yaml", settings), env=s3.env(s3.limited)
    )
    assert code == 8, output
    found = {k: v[1] for k, v in contents(tmp_path / "store").items()}
    assert found == {"good": None, "forbidden": "forbidden_object", "missing": "missing_object"}


@pytest.mark.parametrize(
    ("change", "environment", "code", "sentence"),  # changes of the recipe and of the environment
    [
        ({}, {"AWS_SECRET_ACCESS_KEY": "wrong"}, 4, "the credentials are not accepted for s3://refused/"),
        ({"store": "s3://no-such-bucket/store"}, {}, 4, "the bucket 'no-such-bucket' does not exist"),
        (
            {"manifest": "s3://refused/none.parquet"},
            {},
            3,
            "the manifest s3://refused/none.parquet does not exist",
        ),
        ({"store": "s3://key:secret@refused/store"}, {}, 2, "a s3:// URI carries credentials"),
        (
            {"storage": {"retry_for_s": 1}},
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            75,
            "storage did not answer",
        ),
    ],
)
def test_refused_before_anything_is_written(
    s3: S3Server, tmp_path: Path, change: dict, environment: dict, code: int, sentence: str
) -> None:
    bucket = s3.bucket("refused")
    make_tracks(tmp_path / "audio", 1)
    manifest = make_manifest(tmp_path / "audio", tmp_path / "m.parquet")
    s3.storage().write(join(bucket, "m.parquet"), manifest.read_bytes())
    settings = s3_settings(join(bucket, "m.parquet"), join(bucket, "store")) | change
    recipe = write_recipe(tmp_path / "recipe.yaml", settings)
    found_code, output = run_wealy("extract", recipe, env={**s3.env(), **environment})
    assert found_code == code, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert sentence in line
    assert "Traceback" not in output
    assert "secret@" not in output
    assert [info.uri for info in s3.storage().list(bucket)] == [f"{bucket}/m.parquet"]
