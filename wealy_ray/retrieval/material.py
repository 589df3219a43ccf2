"""What baselines take from a store: transcripts, means of states, detected languages; and collections of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wealy_ray.catalog import tracks_of_split
from wealy_ray.errors import ManifestError, StorageError, StoreError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.recipe import EvaluateRecipe
from wealy_ray.storage import ObjectMissingError, join
from wealy_ray.store import StoreReader, TrackStates
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


MATERIAL_VERSION = 1
"""Part of the kept files' path; moved when their content would differ."""


def material_row(track: TrackStates) -> dict[str, Any]:
    """What is kept of a track, a row of `MATERIAL_SCHEMA`.

    Raises:
        StoreError: A state is NaN or infinite.
    """
    states = track.states.astype(np.float64)
    if not np.isfinite(states).all():
        raise StoreError(f"the states of track '{track.track_id}' hold NaN or infinity; extract it again")
    of_text = states[track.kind == Kind.TEXT]
    return {
        "track_id": track.track_id,
        "text": track.text,
        "language": track.language,
        "num_states": track.num_states,
        "duration_s": track.duration_s,
        "no_speech": [w.no_speech_prob for w in track.windows],
        "mean_all": states.mean(axis=0).tolist() if len(states) else None,
        "mean_text": of_text.mean(axis=0).tolist() if len(of_text) else None,
    }


def tracks_by_shard(index: pa.Table, wanted: pa.Array | None = None) -> list[tuple[str, list[str]]]:
    """The ok tracks of an index, those of a shard together; shards that hold no `wanted` track are left out."""
    rows = index.filter(pc.equal(index["status"], "ok"))
    if wanted is not None:
        shards = pc.unique(rows.filter(pc.is_in(rows["track_id"], value_set=wanted))["shard"])
        rows = rows.filter(pc.is_in(rows["shard"], value_set=shards))
    grouped: dict[str, list[str]] = {}
    for track_id, shard in zip(rows["track_id"].to_pylist(), rows["shard"].to_pylist(), strict=True):
        grouped.setdefault(shard, []).append(track_id)
    return sorted(grouped.items())


def shard_material(reader: StoreReader, shard: str, track_ids: Sequence[str]) -> pa.Table:
    """Material of a shard's tracks; kept beside the shards, so that states are read once.

    Args:
        reader: The store.
        shard: File name of the shard.
        track_ids: Its tracks, as the index names them.

    Raises:
        StoreError: A shard is damaged, or a state is NaN or infinite.
    """
    uri = join(reader.root, "material", str(MATERIAL_VERSION), shard)
    try:
        kept = pq.read_table(pa.BufferReader(reader.storage.read(uri)), schema=MATERIAL_SCHEMA)
    except (ObjectMissingError, pa.ArrowException):
        kept = MATERIAL_SCHEMA.empty_table()
    known = set(kept["track_id"].to_pylist())
    fresh = [material_row(reader.track(t)) for t in track_ids if t not in known]
    if fresh:
        kept = pa.concat_tables([kept, pa.Table.from_pylist(fresh, schema=MATERIAL_SCHEMA)])
        sink = io.BytesIO()
        pq.write_table(kept, sink, compression="zstd", write_page_checksum=True)
        # a store may be readable only: then states are read again next time
        with contextlib.suppress(StorageError):
            reader.storage.impatient().write(uri, sink.getvalue())
    return kept.filter(pc.is_in(kept["track_id"], value_set=pa.array(track_ids, pa.string())))


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

    def rows(self, track_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Id, text and language of tracks that are there."""
        places = [self._row_of[track_id] for track_id in track_ids]
        return self.table.select(["track_id", "text", "language"]).take(places).to_pylist()

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
    table = manifest if split is None else tracks_of_split(manifest, recipe.manifest, split)
    rows = table.to_pylist()
    if material is not None and recipe.without_states == "drop":
        rows = [row for row in rows if row["track_id"] in material]
    detected = material.languages([r["track_id"] for r in rows]) if material is not None else [""] * len(rows)
    languages = [
        found if recipe.languages == "detected" else row["language"] or found
        for row, found in zip(rows, detected, strict=True)
    ]
    kinds = [row["kind"] for row in rows]
    _check_kinds(recipe, manifest)
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


def _check_kinds(recipe: EvaluateRecipe, manifest: pa.Table) -> None:
    """A kind that no track of the manifest has is most likely misspelt."""
    asked = {*(recipe.query_kinds or ()), *(recipe.candidate_kinds or ())}
    there = set(pc.unique(manifest["kind"]).to_pylist()) - {None}
    absent = sorted(asked - there)
    if absent:
        raise ManifestError(
            f"the manifest {recipe.manifest} has no track of kind '{absent[0]}'; "
            + (f"it has {', '.join(sorted(there))}" if there else "it names no kinds")
        )
