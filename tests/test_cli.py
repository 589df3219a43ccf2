"""The command line: one sentence and one exit code for everything a user can get wrong, and nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pipelines.support import (
    contents,
    make_manifest,
    make_tracks,
    newest_index,
    recipe_settings,
    run_wealy,
    shards,
    write_recipe,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with audio, manifest, recipe and a finished store of six tracks."""
    folder = tmp_path_factory.mktemp("finished")
    make_tracks(folder / "audio", 6)
    manifest = make_manifest(folder / "audio", folder / "manifest.parquet")
    recipe = write_recipe(folder / "recipe.yaml", recipe_settings(manifest, folder / "store"))
    code, output = run_wealy("extract", recipe)
    assert code == 0, output
    return folder


def error_of(output: str) -> str:
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("override", "code", "sentence"),
    [
        ("engine.slots=3", 2, "unknown key 'engine.slots'; valid keys here are device"),
        ("engine.num_slots=none", 2, "'engine.num_slots' is 'none'"),
        ("decode.language=klingon", 2, "klingon"),
        (
            "manifest=none.parquet",
            3,
            "the manifest none.parquet does not exist; make one with `wealy manifest`",
        ),
        ("store=RECIPE/below", 4, "cannot be used as a folder"),
        ("store=gopher://x/y", 2, "unknown URI scheme 'gopher'"),
        ("model=no-such-model", 5, "no-such-model"),
        ("model=RECIPE", 5, "recipe.yaml"),
        ("resources.engine_gpus=2", 10, "the engines need 2 GPUs, this machine has 0"),
    ],
)
def test_refused_with_one_sentence(
    finished: Path, tmp_path: Path, override: str, code: int, sentence: str
) -> None:
    override = override.replace("RECIPE", str(finished / "recipe.yaml"))
    store = [] if override.startswith("store") else [f"store={tmp_path / 'store'}"]
    found, output = run_wealy("extract", finished / "recipe.yaml", *store, override)
    assert found == code, output
    assert sentence in error_of(output)
    assert not (tmp_path / "store").exists()


def test_damaged_index(finished: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(finished / "store", tmp_path / "store"))
    expected, before = contents(store), {p: p.read_bytes() for p in store.rglob("*.parquet")}
    newest = next(store.glob(f"*/index/{newest_index(store)}.parquet"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    for command in (("extract", finished / "recipe.yaml", f"store={store}"), ("status", store)):
        code, output = run_wealy(*command)
        assert code == 6, output
        assert f"the index {newest} is damaged" in error_of(output)
    # nothing was written, and the remedy that the sentence names works without decoding anything
    assert set(store.rglob("*.parquet")) == set(before)
    newest.rename(newest.with_suffix(".damaged"))
    code, output = run_wealy("extract", finished / "recipe.yaml", f"store={store}")
    assert code == 0, output
    assert contents(store) == expected
    assert set(shards(store)) == {p for p in before if p.parent.name == "shards"}


def test_damaged_shard_is_not_adopted_and_its_tracks_are_done_again(finished: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(finished / "store", tmp_path / "store"))
    expected = contents(store)
    for index in store.glob("*/index/*.parquet"):
        index.unlink()
    victim = shards(store)[0]
    victim.write_bytes(victim.read_bytes()[:-10])
    code, output = run_wealy("extract", finished / "recipe.yaml", f"store={store}")
    assert code == 0, output
    assert f"shard {victim.name} is not used, its tracks are worked on again" in output
    assert contents(store) == expected


def test_retry_failed_of_a_store_that_is_not_there(finished: Path, tmp_path: Path) -> None:
    code, output = run_wealy("retry-failed", finished / "recipe.yaml", f"store={tmp_path / 'other'}")
    assert code == 6, output
    assert "nothing was extracted to" in error_of(output)
    assert not (tmp_path / "other").exists()


def test_a_disk_that_is_not_mounted_stops_the_run(finished: Path, tmp_path: Path) -> None:
    make_tracks(tmp_path / "mounted", 2)
    manifest = make_manifest(tmp_path / "mounted", tmp_path / "m.parquet")
    (tmp_path / "mounted").rename(tmp_path / "unmounted")
    recipe = finished / "recipe.yaml"
    code, output = run_wealy("extract", recipe, f"manifest={manifest}", f"store={tmp_path / 'store'}")
    assert code == 4, output
    assert "is the disk mounted?" in error_of(output)
    assert not (tmp_path / "store").exists()


def test_credentials_in_an_address_are_refused_and_not_repeated(finished: Path) -> None:
    override = "storage.s3_endpoint_url=https://user:hidden@host"
    code, output = run_wealy("extract", finished / "recipe.yaml", override)
    assert code == 2, output
    assert "credentials do not belong into an address" in error_of(output)
    assert "hidden" not in output


def test_traceback_on_demand_keeps_the_exit_code(tmp_path: Path) -> None:
    code, output = run_wealy("--traceback", "status", tmp_path)
    assert code == 6
    assert "Traceback" in output


def test_status_of_nothing(tmp_path: Path) -> None:
    code, output = run_wealy("status", tmp_path)
    assert code == 6
    assert "there is no store at" in error_of(output)


def test_manifest_from_a_folder_and_its_errors(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.parquet"
    code, output = run_wealy("manifest", finished / "audio", "--out", out)
    assert (code, output) == (0, f"6 tracks written to {out}\n")
    code, output = run_wealy("manifest", finished / "recipe.yaml", "--out", tmp_path / "n.parquet")
    assert code == 3
    assert "no audio files below" in error_of(output)
    assert not (tmp_path / "n.parquet").exists()
    code, output = run_wealy("manifest", finished / "audio", "--out", out, "--column", "path")
    assert code == 2
    assert "'path' is not of the form NAME=THEIRS" in error_of(output)
