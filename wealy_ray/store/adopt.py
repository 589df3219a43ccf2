"""Adoption: work that was written but never indexed, because its driver died, is taken over.

Listing `shards/` finds candidates; a candidate counts only with a readable footer of the right extractor and
payloads that match their checksums. Anything else is refused with a reason: its tracks are worked on again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.errors import StoreError
from wealy_ray.storage import Storage, join
from wealy_ray.store.done import is_done, wanted_columns
from wealy_ray.store.index import Index, find_sorted, one_chunk, one_per_track
from wealy_ray.store.schema import INDEX_SCHEMA
from wealy_ray.store.shard import read_receipt, verify_shard

NUM_THREADS = 8
"""Shards that are read at the same time; each holds one track's payload in memory."""


@dataclass(frozen=True)
class Adoption:
    """What was found.

    Attributes:
        rows: Index rows to publish, one per adopted track, sorted by track_id.
        refused: Shard names with the reason why nothing of them was taken, by name.
    """

    rows: pa.Table
    refused: list[tuple[str, str]]


def adopt(
    storage: Storage,
    root: str,
    index: Index | None,
    wanted: pa.Table,
    *,
    extractor_id: str,
    adopt_failed: bool,
) -> Adoption:
    """Finds finished work in shards that the index does not name.

    Args:
        storage: Where the store is.
        root: `<store>/<extractor_id>`.
        index: The latest index.
        wanted: Tracks still to be done: columns track_id, audio_uri and, nullable or absent, etag.
        extractor_id: What the shards must have been computed with.
        adopt_failed: Whether failed rows count as work done.

    Raises:
        StorageError, TransientError: The storage as a whole refuses, or does not answer.
    """
    wanted = wanted_columns(wanted).sort_by("track_id")
    wanted_ids = one_chunk(wanted["track_id"])

    def look(name: str) -> pa.Table:
        receipt = read_receipt(storage, root, name, extractor_id=extractor_id)
        rows = _wanted_rows(receipt, wanted, wanted_ids, adopt_failed)
        verify_shard(storage, root, name, rows)
        return rows

    return adopt_shards(storage, root, index, look if wanted.num_rows else None, INDEX_SCHEMA)


def adopt_shards(
    storage: Storage,
    root: str,
    index: Index | None,
    look: Callable[[str], pa.Table] | None,
    schema: pa.Schema,
) -> Adoption:
    """Looks into every shard that the index does not name.

    Args:
        storage: Where the store is.
        root: The folder that holds `shards/`.
        index: The latest index.
        look: Gives the rows of a shard that are wanted, verified, or raises StoreError; None: nothing is wanted.
        schema: Of the rows.
    """
    named = index.shards() if index is not None else set()
    names = [info.uri.rsplit("/", 1)[-1] for info in storage.list(join(root, "shards"))] if look else []
    candidates = [n for n in names if n not in named]
    if look is None or not candidates:
        return Adoption(schema.empty_table(), [])

    def try_one(name: str) -> tuple[pa.Table | None, str]:
        try:
            return look(name), ""
        except StoreError as e:
            return None, str(e)

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="adopt") as pool:
        found = list(pool.map(try_one, candidates))
    refused = [(name, why) for name, (_, why) in zip(candidates, found, strict=True) if why]
    rows = pa.concat_tables([schema.empty_table(), *(rows for rows, _ in found if rows is not None)])
    return Adoption(one_per_track(rows), sorted(refused))


def _wanted_rows(receipt: pa.Table, wanted: pa.Table, wanted_ids: pa.Array, adopt_failed: bool) -> pa.Table:
    """Rows of a receipt that answer a wanted track."""
    # a search per row: hashing all wanted ids anew for every shard would cost far more
    places = pa.array([find_sorted(wanted_ids, i) for i in receipt["track_id"].to_pylist()], pa.int64())
    receipt, asked = receipt.filter(pc.is_valid(places)), wanted.take(pc.drop_null(places))
    rows = pa.array(range(receipt.num_rows), pa.int64())
    return receipt.filter(pa.array(is_done(asked, receipt, rows, retry_failed=not adopt_failed)))
