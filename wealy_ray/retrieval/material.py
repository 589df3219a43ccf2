"""What baselines take from a store: transcripts, means of states, detected languages; and collections of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from wealy_ray.errors import ManifestError, StoreError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.recipe import EvaluateRecipe
from wealy_ray.store import StoreReader
from wealy_ray.whisper.types import Kind

MATERIAL_SCHEMA = pa.schema(
    [
        ("track_id", pa.string()),
        ("text", pa.string()),
        ("language", pa.string()),
        ("num_states", pa.int64()),
        ("duration_s", pa.float64()),
        ("no_speech", pa.list_(pa.float32())),
        ("mean_all", pa.list_(pa.float32())),
        ("mean_text", pa.list_(pa.float32())),
    ]
)
"""One row per track with states; a mean over no states is null."""


def read_material(reader: StoreReader, track_ids: Sequence[str]) -> pa.Table:
    """Reads whole tracks, verified, and keeps what is small.

    Raises:
        StoreError: A shard is damaged, or a state is NaN or infinite.
    """
    rows = []
    for track_id in track_ids:
        track = reader.track(track_id)
        states = track.states.astype(np.float64)
        if not np.isfinite(states).all():
            raise StoreError(f"the states of track '{track_id}' hold NaN or infinity; extract it again")
        of_text = states[track.kind == Kind.TEXT]
        rows.append(
            {
                "track_id": track_id,
                "text": track.text,
                "language": track.language,
                "num_states": track.num_states,
                "duration_s": track.duration_s,
                "no_speech": [w.no_speech_prob for w in track.windows],
                "mean_all": states.mean(axis=0).tolist() if len(states) else None,
                "mean_text": of_text.mean(axis=0).tolist() if len(of_text) else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=MATERIAL_SCHEMA)


@dataclass(frozen=True, eq=False)
class Material:
    """Rows of `MATERIAL_SCHEMA`, found by track.

    Attributes:
        table: The rows.
        splits: Split of each track, None where it has none.
    """

    table: pa.Table
    splits: Mapping[str, str | None]

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {track_id: i for i, track_id in enumerate(self.table["track_id"].to_pylist())}

    def __contains__(self, track_id: str) -> bool:
        return track_id in self._row_of

    def texts(self, collection: Collection) -> list[str]:
        """Transcripts in the collection's order; "" for a track without states."""
        texts = self.table["text"].to_pylist()
        return [texts[self._row_of[t]] if t in self._row_of else "" for t in collection.track_ids]

    def languages(self, track_ids: Sequence[str]) -> np.ndarray:
        """Detected languages; "" where there are none."""
        languages = self.table["language"].to_pylist()
        return np.array(
            [(languages[self._row_of[t]] or "") if t in self._row_of else "" for t in track_ids], object
        )

    def means(self, track_ids: Sequence[str], positions: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean states float32 [n, d], zeros where missing, and which are missing, bool [n]."""
        column = self.table[f"mean_{positions}"].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        flat = column.drop_null().flatten().to_numpy(zero_copy_only=False)
        dim = len(flat) // max(1, int(valid.sum()))
        place = np.cumsum(valid) - 1
        vectors = np.zeros((len(track_ids), dim), np.float32)
        missing = np.ones(len(track_ids), bool)
        per_row = flat.reshape(-1, dim) if dim else flat.reshape(0, 0)
        for i, track_id in enumerate(track_ids):
            row = self._row_of.get(track_id)
            if row is not None and valid[row]:
                vectors[i] = per_row[place[row]]
                missing[i] = False
        return vectors, missing


def collection_of(
    recipe: EvaluateRecipe, manifest: pa.Table, material: Material | None, split: str | None
) -> Collection:
    """The tracks of a split, as the recipe asks.

    Raises:
        ManifestError: The split has no tracks, or no query.
    """
    rows = [row for row in manifest.to_pylist() if split is None or row["split"] == split]
    if not rows:
        named = ", ".join(sorted({str(s) for s in manifest["split"].to_pylist()}))
        raise ManifestError(f"the manifest {recipe.manifest} has no track of split '{split}'; it has {named}")
    if material is not None and recipe.without_states == "drop":
        rows = [row for row in rows if row["track_id"] in material]
    detected = material.languages([r["track_id"] for r in rows]) if material is not None else [""] * len(rows)
    languages = [
        found if recipe.languages == "detected" else row["language"] or found
        for row, found in zip(rows, detected, strict=True)
    ]
    kinds = [row["kind"] for row in rows]
    collection = Collection.of(
        [row["track_id"] for row in rows],
        [row["clique_id"] for row in rows],
        languages=languages,
        kinds=kinds,
        splits=[row["split"] for row in rows],
        is_query=[recipe.query_kinds is None or kind in recipe.query_kinds for kind in kinds],
        is_candidate=[recipe.candidate_kinds is None or kind in recipe.candidate_kinds for kind in kinds],
    )
    if not len(collection.queries):
        where = f"split '{split}' of " if split else ""
        raise ManifestError(
            f"{where}the manifest {recipe.manifest} has no query: no clique has two tracks here"
            + (" that have states" if material is not None else "")
        )
    return collection
