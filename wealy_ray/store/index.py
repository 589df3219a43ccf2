"""The index: the commit of a store, and the only thing that readers trust.

Each index is a full snapshot under the next number, written if absent. A driver claims the store by writing
the next number with the same rows and a new epoch; the next number of a driver that was superseded exists
then already, so its write fails and it stops (`FencedError`).
"""

from __future__ import annotations

import bisect
import re
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wealy_ray.errors import FencedError, StoreError
from wealy_ray.storage import ObjectMissingError, Storage, join
from wealy_ray.store.schema import FORMAT_VERSION, INDEX_SCHEMA
from wealy_ray.store.seal import PLACEHOLDER, is_sealed, seal


@dataclass(frozen=True, eq=False)
class Index:
    """One snapshot of a store.

    Attributes:
        number: n of `index/<n>.parquet`.
        epoch: Number of the claim under which it was written.
        table: One row per track, sorted by track_id; `INDEX_SCHEMA`, or `EMBEDDING_INDEX_SCHEMA`.
        metadata: The file's metadata: parent, epoch, run_id, manifest_digest, ok, failed, and further facts.
    """

    number: int
    epoch: int
    table: pa.Table
    metadata: Mapping[str, str]
    _ids: pa.Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", one_chunk(self.table["track_id"]))

    def __len__(self) -> int:
        return self.table.num_rows

    def __contains__(self, track_id: str) -> bool:
        return self.find(track_id) is not None

    def counts(self) -> dict[str, int]:
        """Number of tracks by status: {"ok": ..., "failed": ...}."""
        return counts_of(self.table)

    def find(self, track_id: str) -> int | None:
        """Row number of a track, None when it is not there."""
        return find_sorted(self._ids, track_id)

    def row(self, track_id: str) -> dict[str, Any] | None:
        """A track's row as a dictionary, None when it is not there."""
        place = self.find(track_id)
        return None if place is None else {n: self.table[n][place].as_py() for n in self.table.column_names}

    def positions(self, track_ids: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """Row numbers (int32) of many tracks, null where a track is not there."""
        return pc.index_in(track_ids.cast(pa.string()), value_set=self._ids)

    def shards(self) -> set[str]:
        """Names of the shards that hold at least one of the rows."""
        return set(pc.unique(self.table["shard"]).to_pylist())


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array (versions of pyarrow differ in what `combine_chunks` returns)."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def find_sorted(ids: pa.Array, track_id: str) -> int | None:
    """Place of `track_id` in sorted ids, None when it is not there."""
    # arrow sorts strings by their UTF-8 bytes, which is the order of Python's strings as well
    place = bisect.bisect_left(range(len(ids)), track_id, key=lambda i: ids[i].as_py())
    return place if place < len(ids) and ids[place].as_py() == track_id else None


def index_uri(root: str, number: int) -> str:
    """URI of an index file."""
    return join(root, "index", f"{number}.parquet")


def list_numbers(storage: Storage, root: str) -> list[int]:
    """Numbers of all index files, ascending."""
    names = (info.uri.rsplit("/", 1)[-1] for info in storage.list(join(root, "index")))
    return sorted(int(m.group(1)) for name in names if (m := re.fullmatch(r"([1-9]\d*)\.parquet", name)))


def read_latest(storage: Storage, root: str) -> Index | None:
    """The index with the highest number; None when there is none.

    Raises:
        StoreError: It is damaged; the sentence says what to do.
    """
    numbers = list_numbers(storage, root)
    return read_index(storage, root, numbers[-1]) if numbers else None


def read_index(storage: Storage, root: str, number: int) -> Index:
    """The index with this number.

    Raises:
        StoreError: It is missing or damaged; the sentence says what to do.
    """
    uri = index_uri(root, number)
    try:
        data = storage.read(uri)
    except ObjectMissingError as e:
        raise StoreError(f"the index {uri} does not exist") from e
    if not is_sealed(data):
        fault = "its checksum is missing or wrong"
    else:
        file = pq.ParquetFile(pa.BufferReader(data))
        found = {k.decode(): v.decode() for k, v in file.metadata.metadata.items()}
        metadata = {k: v for k, v in found.items() if k != "ARROW:schema"}
        fault = _fault_in(metadata, number)
    if fault:
        raise StoreError(
            f"the index {uri} is damaged ({fault}); stop all drivers of this store, then restore the file "
            "from a backup, or rename it so that it does not end in .parquet and run the job that writes it "
            "again: the index before it counts then, and the shards that it does not name are adopted; delete nothing"
        )
    return Index(number, int(metadata["epoch"]), file.read().replace_schema_metadata(None), metadata)


def _fault_in(metadata: dict[str, str], number: int) -> str:
    """What is wrong with an index whose bytes are as they were written; empty when nothing is."""
    if metadata["wealy_format"] != FORMAT_VERSION:
        return f"its format is {metadata['wealy_format']}, this version reads {FORMAT_VERSION}"
    if metadata["number"] != str(number):
        return f"it was written as number {metadata['number']}"
    return ""


def counts_of(rows: pa.Table) -> dict[str, int]:
    """Number of rows by status; both states always appear."""
    found = Counter({v["values"]: v["counts"] for v in pc.value_counts(rows["status"]).to_pylist()})
    return {"ok": found["ok"], "failed": found["failed"]}


def one_per_track(rows: pa.Table) -> pa.Table:
    """Index rows sorted by track, each track once.

    Of doubled tracks (a block that ran twice) an ok row wins over a failed one, then the lowest shard name.
    """
    # "ok" sorts after "failed", hence descending
    order = [("track_id", "ascending"), ("status", "descending"), ("shard", "ascending")]
    rows = rows.sort_by(order).combine_chunks()
    if rows.num_rows < 2:
        return rows
    ids = rows["track_id"]
    is_new = pc.not_equal(ids.slice(1), ids.slice(0, rows.num_rows - 1))
    return rows.filter(pa.concat_arrays([pa.array([True]), *is_new.chunks]))


class IndexWriter:
    """The right to publish indexes of one store, until somebody else claims it.

    Args:
        storage: Where the store is.
        root: The folder that holds `index/`.
        schema: Columns of the index; track_id, status and shard are among them.
        facts: What further stands in the metadata of each index.

    Attributes:
        index: The last index this writer has published.
        epoch: Number of this writer's claim.
    """

    def __init__(self, storage: Storage, root: str, schema: pa.Schema, facts: Mapping[str, str]) -> None:
        self._storage, self._root = storage, root
        self._schema, self._facts = schema, facts
        self.index: Index
        self.epoch: int

    @classmethod
    def claim(
        cls,
        storage: Storage,
        root: str,
        *,
        manifest_digest: str,
        run_id: str,
        schema: pa.Schema = INDEX_SCHEMA,
        facts: Mapping[str, str] | None = None,
    ) -> IndexWriter:
        """Claims the store: publishes the next number with the same rows and a new epoch.

        Args:
            storage, root, schema, facts: See the class.
            manifest_digest: Of the manifest that is worked on.
            run_id: Who claims it.

        Raises:
            FencedError: Somebody else has claimed it at the same moment.
            StoreError: The highest index is damaged.
        """
        latest = read_latest(storage, root)
        number = latest.number + 1 if latest is not None else 1
        standing = {"run_id": run_id, "manifest_digest": manifest_digest}
        writer = cls(storage, root, schema, standing | dict(facts or {}))
        writer.epoch = number
        writer._write(number, latest.table if latest is not None else schema.empty_table())
        return writer

    def publish(self, new_rows: pa.Table) -> Index:
        """Publishes the next index: the rows so far, those of the same tracks replaced by `new_rows`.

        Args:
            new_rows: Receipts; of doubled tracks one row is taken, see `one_per_track`.

        Raises:
            FencedError: Somebody else has claimed the store since.
        """
        old = self.index.table
        keep = pc.invert(pc.is_in(old["track_id"], value_set=new_rows["track_id"].combine_chunks()))
        merged = pa.concat_tables([old.filter(keep), one_per_track(new_rows.select(self._schema.names))])
        return self._write(self.index.number + 1, merged.sort_by("track_id"))

    def _write(self, number: int, table: pa.Table) -> Index:
        counts = counts_of(table)
        metadata = {
            "wealy_format": FORMAT_VERSION,
            "number": str(number),
            "parent": str(number - 1),
            "epoch": str(self.epoch),
            **self._facts,
            "ok": str(counts["ok"]),
            "failed": str(counts["failed"]),
            # tells a retried write of ours from somebody else's file with the same rows
            "nonce": uuid.uuid4().hex,
            "checksum": PLACEHOLDER,
        }
        # the metadata is added to the footer: in the schema it would stand twice, once encoded
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, self._schema, compression="zstd", write_page_checksum=True) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(metadata)
        uri = index_uri(self._root, number)
        if not self._storage.write_if_absent(uri, seal(sink.getvalue().to_pybytes())):
            raise FencedError(
                f"another driver has claimed this store ({uri} exists already), so this one stops; the "
                "shards it has written stay, and the next run adopts them"
            )
        self.index = Index(number, self.epoch, table, metadata)
        return self.index
