"""Trains one model and embeds the test split with it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from examples.reproduce_small.plan import Variant
from wealy_ray.catalog import read_manifest, write_manifest
from wealy_ray.config import load_settings
from wealy_ray.model import load_model
from wealy_ray.storage import Storage
from wealy_ray.training.alone import train_alone
from wealy_ray.training.data import Tracks
from wealy_ray.training.measure import Embedder
from wealy_ray.training.recipe import TrainRecipe

RECIPE = "recipes/reproduce-small-train.yaml"


def slug(variant: Variant, seed: int) -> str:
    """Names a model's files."""
    return f"{re.sub(r'[^a-z0-9]+', '-', variant.name.lower())}-{seed}"


def train_and_embed(variant: Variant, seed: int, folder: Path) -> str:
    """Trains and embeds, unless that was done, and leaves `<folder>/vectors/<slug>.parquet`.

    Returns:
        One line about it.
    """
    torch.set_num_threads(1)
    name = slug(variant, seed)
    changes: dict[str, Any] = {**variant.changes, "seed": seed, "out": str(folder / "trainings" / name)}
    changes["manifest"] = str(folder / "manifest.parquet")
    if variant.works is not None:
        changes["manifest"] = str(_with_fewer_works(folder, variant.works))
    recipe = load_settings(TrainRecipe, RECIPE, changes)
    job = train_alone(recipe)
    history = job.history()
    line = f"{variant.name}, seed {seed}: loss {history[-1]['loss']:.3f}, validation MAP {history[-1]['map']:.3f}"
    model, out = load_model(job.model_uri), folder / "vectors" / f"{name}.parquet"
    of_model = {"model_digest": model.config.digest}
    if (
        out.exists()
        and (pq.read_schema(out).metadata or {}).get(b"model_digest") == model.config.digest.encode()
    ):
        return line
    crops = job.splits.crops
    tracks = Tracks.of_split(job.manifest.table, recipe.manifest, "test", crops)
    z, offsets = Embedder(model.network, crops, 0, 1, torch.device("cpu")).embed(tracks, windows=True)
    counts = np.diff(offsets)
    table = pa.table(
        {
            "track_id": pa.array(np.repeat(np.array(tracks.track_ids, object), counts), pa.string()),
            "window": pa.array(np.concatenate([np.arange(n) for n in counts]), pa.int32()),
            "z": pa.FixedSizeListArray.from_arrays(pa.array(z.ravel()), z.shape[1]),
        }
    ).replace_schema_metadata(of_model)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    Storage().write(str(out), sink.getvalue())
    return line


def _with_fewer_works(folder: Path, works: int) -> Path:
    """A manifest whose training split has so many works with two versions or more; larger ones hold the smaller."""
    path = folder / f"manifest-{works}.parquet"
    table = read_manifest(Storage(), str(folder / "manifest.parquet")).table
    splits, cliques = table["split"].to_pylist(), table["clique_id"].to_pylist()
    training = [c for c, split in zip(cliques, splits, strict=True) if split == "train" and c is not None]
    # the songs of `training-songs` (t3...) come before `more-songs` (m4...)
    names = sorted({c for c in training if training.count(c) > 1}, key=lambda c: (not c.startswith("t"), c))
    kept = set(names[:works])
    changed = [
        "unused" if split == "train" and clique not in kept else split
        for split, clique in zip(splits, cliques, strict=True)
    ]
    position = table.schema.get_field_index("split")
    write_manifest(Storage(), str(path), table.set_column(position, "split", pa.array(changed, pa.string())))
    return path
