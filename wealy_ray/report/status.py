"""What is in a store, now: read from its index, at any time, without Ray."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.errors import StoreError
from wealy_ray.report.tables import counts_in_words, two_columns
from wealy_ray.storage import Storage, join
from wealy_ray.store import (
    Index,
    Release,
    embeddings_folder,
    is_embedded,
    lie_in,
    list_embedders,
    list_extractors,
    lost_shards,
    newest_release,
    read_latest,
)

FAILURES_SHOWN = 20


def store_status(storage: Storage, store: str) -> str:
    """Counts of every extractor in a store.

    Raises:
        StoreError: There is no store, or an index is damaged.
    """
    extractors = list_extractors(storage, store)
    if not extractors:
        raise StoreError(f"there is no store at {store}; `wealy extract` makes one")
    return "\n".join(_extractor_status(storage, store, name) for name in extractors)


def _extractor_status(storage: Storage, store: str, extractor_id: str) -> str:
    root = join(store, extractor_id)
    index = read_latest(storage, root)
    if index is None:
        return two_columns(root, [("tracks", "none yet")])
    rows, counts = index.table, index.counts()
    shards = {info.uri.rsplit("/", 1)[-1]: info.size for info in storage.list(join(root, "shards"))}
    unnamed, lost = shards.keys() - index.shards(), frozenset(index.shards() - shards.keys())
    num_lost = lie_in(lost, rows["track_id"], index).sum()
    gone = f"{num_lost} tracks in {len(lost)} shards; `wealy extract` makes them again" if lost else ""
    table = two_columns(
        root,
        [
            ("index", f"number {index.number}, written by run {index.metadata['run_id']}"),
            ("tracks", f"{len(index)} = {counts['ok']} ok + {counts['failed']} failed"),
            ("failures", counts_in_words(value_counts(rows["error_type"]))),
            ("states", f"{pc.sum(rows['num_states']).as_py() or 0:,}"),
            ("audio", f"{(pc.sum(rows['duration_s']).as_py() or 0) / 3600:.2f} h"),
            ("languages", counts_in_words(value_counts(rows["language"]))),
            ("shards", f"{len(shards)} files, {sum(shards.values()) / 1e6:.1f} MB"),
            ("gone", gone),
            ("not indexed", f"{len(unnamed)} shards; the next run adopts what is missing" if unnamed else ""),
        ],
    )
    release = newest_release(storage, store, extractor_id)
    return "\n".join([table, *_failures(index), *_embeddings(storage, root, index), *_release(release)])


def _failures(index: Index) -> list[str]:
    failed = index.table.filter(pc.equal(index.table["status"], "failed"))
    shown = failed.slice(0, FAILURES_SHOWN)
    lines = [
        f"  failed  {track_id}: {kind}"
        for track_id, kind in zip(shown["track_id"].to_pylist(), shown["error_type"].to_pylist(), strict=True)
    ]
    if failed.num_rows > FAILURES_SHOWN:
        lines.append(f"  failed  ... and {failed.num_rows - FAILURES_SHOWN} more")
    return lines


def _embeddings(storage: Storage, root: str, states: Index) -> list[str]:
    lines = []
    for embedder_id, settings in list_embedders(storage, root).items():
        folder = join(embeddings_folder(root), embedder_id)
        index = read_latest(storage, folder)
        if index is None:
            continue
        lost = lie_in(lost_shards(storage, folder, index), states.table["track_id"], index)
        counts, left = index.counts(), int((lost | ~is_embedded(states.table, index)).sum())
        vectors, windows = pc.sum(index.table["num_windows"]).as_py() or 0, settings["windows"]
        of = f"{windows['mode']} of {windows['size']} states" + (
            f" every {windows['stride']}" if windows["mode"] == "windows" else ""
        )
        lines.append(
            f"  embeddings {embedder_id}: {len(index)} tracks = {counts['ok']} ok + {counts['failed']} failed, "
            f"{vectors:,} vectors" + (f"; {left} tracks are to be embedded" if left else "")
        )
        lines.append(
            f"    model {settings['model_digest'][:8]}, {of}, written by run {index.metadata['run_id']}"
        )
    return lines


def _release(found: tuple[int, Release] | None) -> list[str]:
    if found is None:
        return []
    number, of = found
    states = f"of states as of index {of.index}"
    return [f"  release {number}: embeddings {of.embedder_id} as of index {of.embeddings_index}, {states}"]


def value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value stands in a column, most frequent first; nulls are left out."""
    found = pc.value_counts(pc.drop_null(column)).to_pylist()
    return {v["values"]: v["counts"] for v in sorted(found, key=lambda v: (-v["counts"], v["values"]))}
