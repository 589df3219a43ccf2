"""`make reproduce-small`: what it would train, and that vectors are those of the model that is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.reproduce_small.plan import EPOCHS, SEEDS, WARMUP_EPOCHS, Variant, variants
from examples.reproduce_small.training import RECIPE, slug, train_and_embed
from tests.store.songs import make_song_store
from wealy_ray.catalog import read_manifest, write_manifest
from wealy_ray.config import load_settings
from wealy_ray.model import load_model
from wealy_ray.storage import Storage
from wealy_ray.training.recipe import TrainRecipe

SMALL = {
    "model": {"kind": "avg_mlp", "width": 8, "output_dim": 4},
    "data": {"cliques_per_batch": 6},
    "optimiser": {"epochs": 1, "warmup_epochs": 0},
    "validation": {"every_epochs": 1},
    "tracking": [],
}


def test_every_model_is_a_recipe_whose_last_epoch_counts() -> None:
    recipe = load_settings(TrainRecipe, RECIPE, {})
    assert (recipe.optimiser.epochs, recipe.optimiser.warmup_epochs) == (EPOCHS, WARMUP_EPOCHS)
    for variant in variants():
        changed = load_settings(TrainRecipe, RECIPE, variant.changes)
        assert changed.validation.every_epochs == changed.optimiser.epochs
        assert (changed != recipe) == (variant.name != "WEALY")
    names = [slug(variant, seed) for variant in variants() for seed in SEEDS]
    assert len(set(names)) == len(names)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Songs of which three works of validation are for the test."""
    make_song_store(str(tmp_path), Storage())
    table = read_manifest(Storage(), str(tmp_path / "manifest.parquet")).table
    splits = [
        "test" if clique in ("c17", "c18", "c19") else split
        for clique, split in zip(table["clique_id"].to_pylist(), table["split"].to_pylist(), strict=True)
    ]
    position = table.schema.get_field_index("split")
    changed = table.set_column(position, "split", pa.array(splits, pa.string()))
    write_manifest(Storage(), str(tmp_path / "manifest.parquet"), changed)
    return tmp_path


def test_a_model_that_was_trained_anew_is_embedded_anew(folder: Path) -> None:
    changes = {**SMALL, "store": str(folder / "store")}
    vectors = folder / "vectors" / "small-0.parquet"

    def made(**more: object) -> tuple[pa.Table, int]:
        train_and_embed(Variant("small", "systems", changes | more), 0, folder)
        table = pq.read_table(vectors)
        digest = load_model(str(folder / "trainings" / "small-0" / "model")).config.digest
        assert table.schema.metadata[b"model_digest"].decode() == digest
        return table, vectors.stat().st_mtime_ns

    first, at = made()
    assert len(set(first["track_id"].to_pylist())) == 9
    assert made() == (first, at), "nothing was to be done"
    shutil.rmtree(folder / "trainings")
    second, later = made(optimiser={"epochs": 1, "warmup_epochs": 0, "learning_rate": 0.1})
    assert later > at
    assert second["z"] != first["z"]


def test_fewer_works_are_the_first_ones(folder: Path) -> None:
    changes = {**SMALL, "store": str(folder / "store")}
    train_and_embed(Variant("few", "curve", changes, works=4), 0, folder)
    table = read_manifest(Storage(), str(folder / "manifest-4.parquet")).table
    rows = zip(table["clique_id"].to_pylist(), table["split"].to_pylist(), strict=True)
    assert sorted({clique for clique, split in rows if split == "train"}) == ["c00", "c01", "c02", "c03"]
