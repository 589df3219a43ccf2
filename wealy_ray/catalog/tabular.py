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
    rows = _csv_rows(text) if source.lower().endswith(".csv") else _json_rows(text, source)
    if not rows:
        raise ManifestError(f"{source} has no rows")
    table = _to_table(rows, source, columns)
    table = validate(table, source)
    folder = source.rsplit("/", 1)[0] if "/" in source else "."
    if scheme_of(folder) == "file":
        folder = os.path.abspath(folder.removeprefix("file://"))
    uris = [
        uri
        if scheme_of(uri) != "file" or os.path.isabs(uri) or uri.startswith("file:")
        else join(folder, uri)
        for uri in table["audio_uri"].to_pylist()
    ]
    table = table.set_column(1, MANIFEST_SCHEMA.field("audio_uri"), pa.array(uris, pa.string()))
    return with_object_versions(storage, table)


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


def _csv_rows(text: str) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k is not None}
        for row in csv.DictReader(io.StringIO(text, newline=""))
    ]


def _json_rows(text: str, source: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
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
