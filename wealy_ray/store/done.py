"""Which tracks of a manifest are done.

A track is done when the index holds its id for the same audio: where the manifest names a version (etag),
the row was read at that version or for that version; where it names none, the row was read from the same URI.
Failed tracks count as done, unless they are to be retried. Nothing is done that lies in a shard that is gone.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.storage import Storage, join
from wealy_ray.store.index import Index


def split_work(manifest: pa.Table, index: Index | None, *, retry_failed: bool = False) -> np.ndarray:
    """Which rows of a manifest are done.

    Args:
        manifest: Columns track_id, audio_uri and, nullable or absent, etag.
        index: The store's state; None: nothing is done.
        retry_failed: Failed tracks are not done.

    Returns:
        bool [num_rows], True where the track is done.
    """
    if index is None:
        return np.zeros(manifest.num_rows, bool)
    manifest = wanted_columns(manifest)
    return is_done(manifest, index.table, index.positions(manifest["track_id"]), retry_failed=retry_failed)


def wanted_columns(manifest: pa.Table) -> pa.Table:
    """The three columns that identify a track's audio, as plain strings whatever wrote the manifest."""
    columns = {
        n: manifest[n].cast(pa.string())
        if n in manifest.column_names
        else pa.nulls(len(manifest), pa.string())
        for n in ("track_id", "audio_uri", "etag")
    }
    return pa.table(columns)


def is_done(
    manifest: pa.Table,
    rows: pa.Table,
    positions: pa.Array | pa.ChunkedArray,
    *,
    retry_failed: bool,
) -> np.ndarray:
    """The rule itself, for manifest row i against row `positions[i]` of `rows`.

    Args:
        manifest: What `wanted_columns` makes of a manifest.
        rows: Index rows.
        positions: int [num manifest rows], null where there is no row.
        retry_failed: Failed rows are not done.

    Returns:
        bool [num manifest rows].
    """
    if not manifest.num_rows or not rows.num_rows:
        return np.zeros(manifest.num_rows, bool)
    names = ["audio_uri", "audio_etag", "manifest_etag", "status"]
    # a missing position becomes row 0, and is masked at the end
    found = rows.select(names).take(pc.fill_null(positions, 0))
    etag = manifest["etag"]
    same_version = pc.or_(_equal(etag, found["audio_etag"]), _equal(etag, found["manifest_etag"]))
    same_uri = _equal(manifest["audio_uri"], found["audio_uri"])
    done = pc.and_(pc.if_else(pc.is_null(etag), same_uri, same_version), pc.is_valid(positions))
    if retry_failed:
        done = pc.and_(done, pc.equal(found["status"], "ok"))
    return np.asarray(done, bool)


def _equal(a: pa.ChunkedArray, b: pa.ChunkedArray) -> pa.ChunkedArray:
    """Equality in which null equals nothing."""
    return pc.fill_null(pc.equal(a, b), False)


def lost_shards(storage: Storage, root: str, index: Index | None) -> frozenset[str]:
    """Names of shards that an index names and that are not there.

    Args:
        storage: Where to look.
        root: The folder that holds `shards/`.
        index: Read before this is asked; None: nothing is lost.
    """
    if index is None:
        return frozenset()
    there = {info.uri.rsplit("/", 1)[-1] for info in storage.list(join(root, "shards"))}
    return frozenset(index.shards() - there)


def lie_in(shards: frozenset[str], track_ids: pa.ChunkedArray, index: Index | None) -> np.ndarray:
    """Which tracks have their row in one of some shards, bool [num tracks]."""
    if index is None or not shards or not len(track_ids):
        return np.zeros(len(track_ids), bool)
    named = index.table["shard"].take(index.positions(track_ids))  # null where there is no row
    return np.asarray(pc.is_in(named, value_set=pa.array(sorted(shards), pa.string())), bool)
