"""What stands in `metrics.json` beside the metrics: what was compared, and how its extraction went."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.report.extract_summary import extraction_speed
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.material import Material
from wealy_ray.retrieval.recipe import EvaluateRecipe
from wealy_ray.retrieval.scores import Scores
from wealy_ray.store import StoreReader

SAMPLE_TRACKS = 60
"""Tracks in the similarity matrix of the report."""
HISTOGRAM_VALUES = 100_000
"""At most so many values are kept for a histogram."""


def counts_of(
    recipe: EvaluateRecipe, manifest: pa.Table, collection: Collection, material: Material | None
) -> dict[str, Any]:
    """Numbers of tracks, queries, candidates and cliques."""
    ids, splits = manifest["track_id"].to_pylist(), manifest["split"].to_pylist()
    of_split = [t for t, s in zip(ids, splits, strict=True) if recipe.split is None or s == recipe.split]
    return {
        "tracks": len(of_split),
        "queries": len(collection.queries),
        "candidates": len(collection.candidates),
        "cliques": len(np.unique(collection.cliques[collection.queries])),
        "without_states": sum(t not in material for t in of_split) if material is not None else 0,
        "policy": recipe.without_states,
        "split": recipe.split,
    }


def extraction_of(manifest: pa.Table, material: Material, reader: StoreReader) -> dict[str, Any]:
    """How the manifest's tracks fared when they were extracted."""
    index = reader.index.table
    rows = index.filter(pc.is_in(index["track_id"], value_set=manifest["track_id"].combine_chunks()))

    def counts(column: str) -> dict[str, int]:
        found = pc.value_counts(rows[column].drop_null()).to_pylist()
        return {v["values"]: v["counts"] for v in sorted(found, key=lambda v: -v["counts"])}

    status = counts("status")
    return {
        "tracks": rows.num_rows,
        "ok": status.get("ok", 0),
        "failed": status.get("failed", 0),
        "audio_s": pc.sum(rows["duration_s"]).as_py() or 0.0,
        "audio_s_per_s": extraction_speed(reader.storage, reader.root),
        "states": pc.sum(rows["num_states"]).as_py() or 0,
        "languages": counts("language"),
        "failures": counts("error_type"),
        "states_per_track": material.table["num_states"].to_pylist()[:HISTOGRAM_VALUES],
        "no_speech": pc.list_flatten(material.table["no_speech"]).to_pylist()[:HISTOGRAM_VALUES],
    }


def similarity_sample(name: str, scores: Scores, collection: Collection) -> bytes | None:
    """Similarities of a few cliques' tracks, as `.npz`; None where no query is a candidate."""
    order = collection.queries[np.argsort(collection.cliques[collection.queries], kind="stable")]
    order = order[collection.is_candidate[order]][:SAMPLE_TRACKS]
    if not len(order):
        return None
    sample = scores.rows(order).cpu().numpy()[:, collection.column_of[order]]
    sink = io.BytesIO()
    np.savez(
        sink,
        similarity=sample,
        track_ids=collection.track_ids[order].astype(str),
        clique_ids=np.array([collection.clique_names[c] for c in collection.cliques[order]]),
        system=np.array(name),
    )
    return sink.getvalue()
