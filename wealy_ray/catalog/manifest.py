"""The manifest: a Parquet file with one row per track, the input of every job.

Contract: `track_id` (unique, stable) and `audio_uri` are required; everything else may be null. A track
without `clique_id` is a distractor: a candidate, never a query. `kind` is what sort of version it is (original,
cover, live, ...). `etag` and `size` are those of the audio
object when the manifest was made; a new etag marks changed audio.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wealy_ray.errors import ConfigError, ManifestError
from wealy_ray.storage import ObjectMissingError, Storage, check_uri, scheme_of

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("track_id", pa.string(), nullable=False),
        pa.field("audio_uri", pa.string(), nullable=False),
        pa.field("clique_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("title", pa.string()),
        pa.field("artist", pa.string()),
        pa.field("language", pa.string()),
        pa.field("source_id", pa.string()),
        pa.field("etag", pa.string()),
        pa.field("size", pa.int64()),
    ]
)
REQUIRED = ("track_id", "audio_uri")


@dataclass(frozen=True)
class Manifest:
    """A validated manifest.

    Attributes:
        table: Rows in `MANIFEST_SCHEMA`, in file order.
        digest: SHA-256 (hex) of the Parquet file.
    """

    table: pa.Table
    digest: str

    def __len__(self) -> int:
        return self.table.num_rows


def validate(table: pa.Table, source: str) -> pa.Table:
    """Casts a table to `MANIFEST_SCHEMA` and checks the contract.

    Args:
        table: At least the required columns; unknown columns are dropped.
        source: Name of the file, for messages.

    Raises:
        ManifestError: A column is missing or of a wrong type, an id is empty, doubled, or a URI cannot be
            opened by anything; the message names the row's id.
    """
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise ManifestError(
            f"{source} has no column '{missing[0]}'; it has {', '.join(table.column_names) or 'none'} "
            "(name another with --column, e.g. --column audio_uri=path)"
        )
    columns = []
    for field in MANIFEST_SCHEMA:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        try:
            columns.append(table[field.name].cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as e:
            kind = table.schema.field(field.name).type
            raise ManifestError(f"{source}: column '{field.name}' is {kind}, not {field.type}") from e
    # not yet with non-null fields: nulls are reported below with their rows
    nullable = pa.schema([pa.field(f.name, f.type) for f in MANIFEST_SCHEMA])
    table = pa.table(columns, schema=nullable)
    if table.num_rows == 0:
        raise ManifestError(f"{source} has no tracks")
    _check_ids(table, source)
    _check_uris(table, source)
    return table.cast(MANIFEST_SCHEMA)


def _check_ids(table: pa.Table, source: str) -> None:
    ids = table["track_id"]
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(ids), ""), True)
    if pc.any(empty).as_py():
        row = pc.index(empty, True).as_py()
        raise ManifestError(f"{source}: row {row + 1} has an empty track_id")
    if pc.count_distinct(ids).as_py() != len(ids):
        doubled, times = Counter(ids.to_pylist()).most_common(1)[0]
        raise ManifestError(f"{source}: track_id '{doubled}' stands {times} times; ids must be unique")


def _check_uris(table: pa.Table, source: str) -> None:
    seen: set[str] = set()
    for track_id, uri in zip(table["track_id"].to_pylist(), table["audio_uri"].to_pylist(), strict=True):
        if not uri or not uri.strip():
            raise ManifestError(f"{source}: track '{track_id}' has an empty audio_uri")
        scheme = scheme_of(uri)
        if scheme in seen and not {"@", "?"} & set(uri):
            continue
        try:
            check_uri(uri)
        except ConfigError as e:
            raise ManifestError(f"{source}: track '{track_id}': {e}") from e
        seen.add(scheme)


def read_manifest(storage: Storage, uri: str) -> Manifest:
    """Reads and validates a manifest.

    Raises:
        ManifestError: It is missing, no Parquet file, or breaks the contract.
    """
    try:
        data = storage.read(uri)
    except ObjectMissingError as e:
        raise ManifestError(f"the manifest {uri} does not exist; make one with `wealy manifest`") from e
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as e:
        raise ManifestError(f"{uri} is not a Parquet manifest; make one with `wealy manifest`") from e
    return Manifest(validate(table, uri), hashlib.sha256(data).hexdigest())


def tracks_of_split(table: pa.Table, source: str, split: str) -> pa.Table:
    """Rows of one split.

    Args:
        table: Of a manifest.
        source: Its name, for messages.
        split: The split.

    Raises:
        ManifestError: It has no such tracks.
    """
    rows = table.filter(pc.equal(table["split"], split))
    if not rows.num_rows:
        named = ", ".join(sorted(set(table["split"].drop_null().to_pylist()))) or "none"
        raise ManifestError(f"the manifest {source} has no track of split '{split}'; it has {named}")
    return rows


def write_manifest(storage: Storage, uri: str, table: pa.Table) -> None:
    """Validates and writes a manifest, atomically.

    Raises:
        ManifestError: The table breaks the contract; nothing is written.
    """
    sink = io.BytesIO()
    pq.write_table(validate(table, uri), sink, compression="zstd")
    storage.write(uri, sink.getvalue())


def with_object_versions(storage: Storage, table: pa.Table) -> pa.Table:
    """Fills empty `etag` and `size` from listings of the audio's folders.

    One listing per folder, not one request per track. Objects that are not there stay null: extraction
    will say so in their rows.
    """
    etags, sizes = table["etag"].to_pylist(), table["size"].to_pylist()
    uris = table["audio_uri"].to_pylist()
    wanted = [uri for uri, etag in zip(uris, etags, strict=True) if etag is None and _can_list(uri)]
    found = {}
    for folder in _folders(wanted):
        found.update({info.uri: info for info in storage.list(folder)})
    for i, uri in enumerate(uris):
        info = found.get(storage.canonical(uri)) if etags[i] is None else None
        if info is not None:
            etags[i], sizes[i] = info.etag, info.size
    table = table.set_column(table.column_names.index("etag"), "etag", pa.array(etags, pa.string()))
    return table.set_column(table.column_names.index("size"), "size", pa.array(sizes, pa.int64()))


def _can_list(uri: str) -> bool:
    return scheme_of(uri) in ("file", "s3", "gs", "gcs", "az", "abfs", "memory")


def _folders(uris: Iterable[str]) -> list[str]:
    """The folders of `uris` without those that lie below another one."""
    kept: list[str] = []
    for folder in sorted({uri.rsplit("/", 1)[0] for uri in uris}):
        if not kept or not folder.startswith(kept[-1] + "/"):
            kept.append(folder)
    return kept
