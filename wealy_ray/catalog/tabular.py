"""A manifest from a CSV or JSON-lines file."""

from __future__ import annotations

import csv
import io
import json
import os
from typing import Any

import pyarrow as pa

from wealy_ray.catalog.manifest import MANIFEST_SCHEMA, validate, with_object_versions
from wealy_ray.errors import ManifestError
from wealy_ray.storage import ObjectMissingError, Storage, join, scheme_of


def manifest_from_rows(storage: Storage, source: str, columns: dict[str, str]) -> pa.Table:
    """Reads rows from a `.csv` (with a header) or `.jsonl` file.

    Args:
        source: The file. A relative `audio_uri` in it is relative to the file's folder.
        columns: Manifest column -> column of the file, where the names differ.

    Returns:
        A validated table with etags and sizes filled in from the storage's listings.

    Raises:
        ManifestError: Missing or malformed file, missing columns, or rows that break the contract.
    """
    unknown = sorted(set(columns) - set(MANIFEST_SCHEMA.names))
    if unknown:
        raise ManifestError(
            f"'{unknown[0]}' is not a manifest column; they are {', '.join(MANIFEST_SCHEMA.names)}"
        )
    try:
        text = storage.read(source).decode("utf-8-sig")
    except ObjectMissingError as e:
        raise ManifestError(f"{source} does not exist") from e
    except UnicodeDecodeError as e:
        raise ManifestError(f"{source} is not UTF-8 text") from e
    rows = _csv_rows(text, source) if source.lower().endswith(".csv") else _json_rows(text, source)
    if not rows:
        raise ManifestError(f"{source} has no rows")
    table = _to_table(rows, source, columns)
    table = validate(table, source)
    folder = source.rsplit("/", 1)[0] if "/" in source else "."
    if scheme_of(folder) == "file":
        folder = storage.canonical(folder)
    uris = [_absolute(uri, folder) for uri in table["audio_uri"].to_pylist()]
    table = table.set_column(1, MANIFEST_SCHEMA.field("audio_uri"), pa.array(uris, pa.string()))
    return with_object_versions(storage, table)


def _absolute(uri: str, folder: str) -> str:
    if scheme_of(uri) != "file":
        return uri
    path = uri.removeprefix("file://")
    return path if os.path.isabs(path) else join(folder, path)


def _to_table(rows: list[dict[str, Any]], source: str, columns: dict[str, str]) -> pa.Table:
    present = set().union(*rows)
    arrays = {}
    for field in MANIFEST_SCHEMA:
        name = columns.get(field.name, field.name)
        if name in present:
            arrays[field.name] = [_text(row.get(name)) for row in rows]
        elif field.name in columns:
            raise ManifestError(f"{source} has no column '{name}'; it has {', '.join(sorted(present))}")
    # a missing column is named by `validate`, beside the columns that are there
    theirs = {name: pa.nulls(len(rows), pa.string()) for name in sorted(present - set(arrays))}
    return pa.table({**{name: pa.array(values, pa.string()) for name, values in arrays.items()}, **theirs})


def _text(value: Any) -> str | None:
    """Ids may be numbers in the file; an empty cell is null."""
    return None if value is None or value == "" else str(value)


def _csv_rows(text: str, source: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        return [{k: v for k, v in row.items() if k is not None} for row in reader]
    except csv.Error as e:
        raise ManifestError(f"{source}: line {reader.line_num} is not valid CSV: {e}") from e


def _json_rows(text: str, source: str) -> list[dict[str, Any]]:
    rows = []
    # not splitlines: JSON strings may hold other line ends
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise ManifestError(f"{source}: line {number} is not valid JSON") from e
        if not isinstance(row, dict):
            raise ManifestError(f"{source}: line {number} is not a JSON object")
        rows.append(row)
    return rows
