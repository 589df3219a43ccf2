"""Vectors that other systems left behind: folders of CLEWS tensors, Parquet files of embeddings.

A source gives track after track, so that a collection whose vectors do not fit into memory can be written to tiles
(`StoredSets`) and read from there.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from wealy_ray.errors import ConfigError, StoreError
from wealy_ray.retrieval.scores import named
from wealy_ray.storage import ObjectInfo, ObjectMissingError, Storage
from wealy_ray.storage.ranged import RangedFile

NUM_READERS = 16
"""Small files that are read at a time."""
READ_AHEAD = 256
"""Small files that are read before the first of them is used."""
BLOCK_ROWS = 8192
"""Vectors of a Parquet file that are read at a time."""

log = logging.getLogger(__name__)


class VectorSource(Protocol):
    """Vectors by track.

    Attributes:
        num_bytes: About what the vectors take as float32.
        version: Changes whenever a file does.
    """

    @property
    def num_bytes(self) -> int:
        """See above."""
        ...

    @property
    def version(self) -> Sequence[object]:
        """See above."""
        ...

    def tracks(self) -> Iterator[tuple[str, np.ndarray]]:
        """(track id, float32 [S, z]), ids ascending, all with the same z and S >= 1.

        Raises:
            StoreError: A damaged file; NaN or infinity, with the ids, after the last track.
        """
        ...


def open_embeddings(storage: Storage, uri: str, id_from_path: str | None = None) -> VectorSource:
    """Finds out what lies at a URI.

    Args:
        storage: Access.
        uri: A Parquet file, a folder of them, or a folder of `.pt` files.
        id_from_path: For `.pt` files: a regular expression with one group that finds the id in a path below the
            folder, or the URI of a `.json` file that gives the id of each path.

    Raises:
        ConfigError: The rule does not fit.
        StoreError: There is nothing of these kinds.
    """
    try:
        return ParquetVectors(storage, [storage.info(uri)])
    except ObjectMissingError:
        files = list(storage.list(uri))
    tables = [info for info in files if info.uri.endswith(".parquet")]
    tensors = [info for info in files if info.uri.endswith(".pt")]
    if tables and not tensors:
        return ParquetVectors(storage, tables)
    if tables or not tensors:
        found = "both .pt and .parquet files" if tables else "neither a Parquet file nor .pt files"
        raise StoreError(f"there are {found} at {uri}; name one Parquet file, or a folder of one kind")
    if id_from_path is None:
        raise ConfigError(
            f"{uri} is a folder of .pt files: id_from_path must say how a path gives the track's id"
        )
    rule: str | Mapping[str, str] = id_from_path
    if is_mapping(id_from_path):
        rule = _read_mapping(storage, id_from_path)
    return PtFolder.of(storage, uri, tensors, rule)


def is_mapping(id_from_path: str | None) -> TypeGuard[str]:
    """Whether a rule is the URI of a file that gives the ids."""
    return id_from_path is not None and id_from_path.endswith(".json")


@dataclass(frozen=True, eq=False)
class PtFolder:
    """One file per track, as CLEWS writes them: a tensor [S, z] or [z].

    Attributes:
        storage: Access.
        files: Id and file of each track, ids ascending.
    """

    storage: Storage
    files: Sequence[tuple[str, ObjectInfo]]

    @classmethod
    def of(
        cls, storage: Storage, folder: str, files: Sequence[ObjectInfo], rule: str | Mapping[str, str]
    ) -> PtFolder:
        """Gives every file its track.

        Raises:
            ConfigError: The rule has not one group, leaves a file without an id, or gives one id twice.
        """
        root = storage.canonical(folder).rstrip("/") + "/"
        ids = _ids_of([info.uri.removeprefix(root) for info in files], rule)
        return cls(storage, sorted(zip(ids, files, strict=True), key=lambda pair: pair[0]))

    @property
    def num_bytes(self) -> int:
        """See `VectorSource`."""
        return sum(info.size for _, info in self.files)

    @property
    def version(self) -> Sequence[object]:
        """See `VectorSource`."""
        return [[track_id, info.etag, info.size] for track_id, info in self.files]

    def tracks(self) -> Iterator[tuple[str, np.ndarray]]:
        """See `VectorSource`."""
        return _checked(self._read())

    def _read(self) -> Iterator[tuple[str, np.ndarray]]:
        dim = 0
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for first in range(0, len(self.files), READ_AHEAD):
                part = self.files[first : first + READ_AHEAD]
                read = pool.map(lambda pair: _read_pt(self.storage, pair[1].uri), part)
                for (track_id, info), vectors in zip(part, read, strict=True):
                    dim = dim or vectors.shape[1]
                    if vectors.shape[1] != dim:
                        raise StoreError(
                            f"the vectors in {info.uri} have {vectors.shape[1]} dimensions, those in "
                            f"{self.files[0][1].uri} have {dim}"
                        )
                    yield track_id, vectors


@dataclass(frozen=True, eq=False)
class ParquetVectors:
    """Files with `track_id`, `window` and `z`, one row per vector.

    Attributes:
        storage: Access.
        files: The files.
    """

    storage: Storage
    files: Sequence[ObjectInfo]

    @property
    def num_bytes(self) -> int:
        """See `VectorSource`."""
        return sum(table.metadata.num_rows for table in self._tables) * self._dim * 4

    @property
    def version(self) -> Sequence[object]:
        """See `VectorSource`."""
        return [[info.uri, info.etag, info.size] for info in self.files]

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What the first file says about itself."""
        return {k.decode(): v.decode() for k, v in (self._tables[0].schema_arrow.metadata or {}).items()}

    @property
    def is_ordered(self) -> bool:
        """Whether rows stand in the order of tracks and windows, so that they can be read one after the other."""
        return bool((np.diff(self._order) == 1).all())

    def tracks(self) -> Iterator[tuple[str, np.ndarray]]:
        """See `VectorSource`; rows in another order are all read into memory first."""
        return _checked(self._read())

    @cached_property
    def _tables(self) -> list[pq.ParquetFile]:
        return [_open_table(self.storage, info, self.files[0]) for info in self.files]

    @property
    def _dim(self) -> int:
        return int(self._tables[0].schema_arrow.field("z").type.list_size)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Track and window of each row."""
        parts = [table.read(columns=["track_id", "window"]) for table in self._tables]
        for info, part in zip(self.files, parts, strict=True):
            for name in part.column_names:
                if part[name].null_count:
                    raise StoreError(
                        f"column '{name}' of {info.uri} has {part[name].null_count} missing values"
                    )
        ids = [track_id for part in parts for track_id in part["track_id"].to_pylist()]
        windows = np.concatenate([part["window"].to_numpy() for part in parts])
        return np.array(ids, object), windows

    @cached_property
    def _order(self) -> np.ndarray:
        """Rows by track and window.

        Raises:
            StoreError: A window stands twice.
        """
        ids, windows = self._rows
        number = np.unique(ids.astype(str), return_inverse=True)[1]
        order = np.lexsort((windows, number))
        number, sorted_windows = number[order], windows[order]
        twice = np.flatnonzero((number[1:] == number[:-1]) & (sorted_windows[1:] == sorted_windows[:-1]))
        if len(twice):
            row = order[twice[0]]
            raise StoreError(
                f"window {windows[row]} of track '{ids[row]}' stands twice in {self.files[0].uri}"
            )
        return order

    def _read(self) -> Iterator[tuple[str, np.ndarray]]:
        ids = self._rows[0][self._order]
        ends = [*(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)] if len(ids) else []
        blocks = self._blocks()
        if not self.is_ordered:
            blocks = iter([np.concatenate(list(blocks))[self._order]])
        waiting, start, filled = [], 0, 0
        held = np.zeros((0, self._dim), np.float32)
        for end in ends:
            # rows of one track may stand in several blocks
            while start + len(held) + filled < end:
                waiting.append(next(blocks))
                filled += len(waiting[-1])
            if waiting:
                held, waiting, filled = np.concatenate([held, *waiting]), [], 0
            yield str(ids[start]), held[: end - start]
            held, start = held[end - start :], end

    def _blocks(self) -> Iterator[np.ndarray]:
        """Vectors float32 [n, d], in the order of the rows."""
        for info, table in zip(self.files, self._tables, strict=True):
            try:
                for batch in table.iter_batches(BLOCK_ROWS, columns=["z"]):
                    if batch["z"].null_count:
                        raise StoreError(f"column 'z' of {info.uri} has missing values")
                    # a null within a vector becomes NaN, which is refused
                    yield batch["z"].flatten().to_numpy(zero_copy_only=False).reshape(len(batch), self._dim)
            except pa.ArrowException as e:
                raise StoreError(f"{info.uri} cannot be read as Parquet: {e}") from e


def _open_table(storage: Storage, info: ObjectInfo, first: ObjectInfo) -> pq.ParquetFile:
    try:
        table = pq.ParquetFile(RangedFile(storage, info.uri, info.size))
    except pa.ArrowException as e:
        raise StoreError(f"{info.uri} cannot be read as Parquet: {e}") from e
    schema = table.schema_arrow
    absent = [name for name in ("track_id", "window", "z") if name not in schema.names]
    if absent:
        raise StoreError(f"{info.uri} has no column '{absent[0]}'; embeddings have track_id, window and z")
    z_type = schema.field("z").type
    if not (pa.types.is_fixed_size_list(z_type) and pa.types.is_float32(z_type.value_type)):
        raise StoreError(f"column 'z' of {info.uri} is {z_type}; it must be fixed_size_list<float32>[d]")
    if info is not first:
        theirs = _open_table(storage, first, first).schema_arrow.field("z").type.list_size
        if theirs != z_type.list_size:
            raise StoreError(
                f"the vectors in {info.uri} have {z_type.list_size} dimensions, those in {first.uri} have {theirs}"
            )
    return table


@dataclass(frozen=True, eq=False)
class PackedVectors:
    """One or several vectors per track.

    Attributes:
        track_ids: Unique, ascending.
        vectors: float32 [total, d].
        offsets: int64 [num_tracks + 1]; track i has `vectors[offsets[i]:offsets[i + 1]]`.
    """

    track_ids: np.ndarray
    vectors: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, source: VectorSource) -> PackedVectors:
        """Reads all of a source into memory."""
        pairs = list(source.tracks())
        vectors = [v for _, v in pairs]
        return cls(
            np.array([track_id for track_id, _ in pairs], object),
            np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32),
            np.cumsum([0, *map(len, vectors)], dtype=np.int64),
        )


def write_embeddings(storage: Storage, uri: str, packed: PackedVectors, metadata: Mapping[str, str]) -> None:
    """Writes a Parquet file `track_id, window, z`, one row per vector, with metadata of the file."""
    sizes = np.diff(packed.offsets)
    windows = np.arange(len(packed.vectors)) - np.repeat(packed.offsets[:-1], sizes)
    dim = packed.vectors.shape[1]
    flat = pa.array(np.ascontiguousarray(packed.vectors, np.float32).reshape(-1))
    columns = {
        "track_id": pa.array(np.repeat(packed.track_ids, sizes), pa.string()),
        "window": pa.array(windows, pa.int32()),
        "z": pa.FixedSizeListArray.from_arrays(flat, dim),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(dict(metadata)), buffer)
    storage.write(uri, buffer.getvalue())


def _checked(tracks: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    bad = []
    for track_id, vectors in tracks:
        if not np.isfinite(vectors).all():
            bad.append(track_id)
        yield track_id, vectors
    if bad:
        raise StoreError(
            f"the vectors of {len(bad)} tracks hold NaN or infinity: {named(bad)}; compute them again, or leave "
            "these tracks out"
        )


def _read_mapping(storage: Storage, uri: str) -> dict[str, str]:
    try:
        found = json.loads(storage.read(uri))
    except ValueError as e:
        raise ConfigError(f"{uri} is not JSON: {e}") from e
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ConfigError(f"{uri} must hold one JSON object that gives the track's id by path")
    return found


def _ids_of(paths: Sequence[str], rule: str | Mapping[str, str]) -> list[str]:
    if isinstance(rule, str):
        try:
            pattern = re.compile(rule)
        except re.error as e:
            raise ConfigError(f"'{rule}' is no regular expression: {e}") from e
        if pattern.groups != 1:
            raise ConfigError(f"'{rule}' has {pattern.groups} groups; it needs one, which is the track's id")
        matches = [pattern.search(path) for path in paths]
        found = [match.group(1) if match else None for match in matches]
    else:
        found = [rule.get(path) for path in paths]
        absent = sorted(rule.keys() - set(paths))
        if absent:
            log.warning("%d of %d paths have no file: %s", len(absent), len(rule), named(absent))
    unmatched = [path for path, track_id in zip(paths, found, strict=True) if not track_id]
    if unmatched:
        raise ConfigError(f"the rule gives no track id for {len(unmatched)} files: {named(unmatched)}")
    ids = [track_id for track_id in found if track_id]
    doubled = [track_id for track_id, number in Counter(ids).items() if number > 1]
    if doubled:
        theirs = [path for path, track_id in zip(paths, ids, strict=True) if track_id == doubled[0]]
        raise ConfigError(f"the rule gives track id '{doubled[0]}' to {len(theirs)} files: {named(theirs)}")
    return ids


def _read_pt(storage: Storage, uri: str) -> np.ndarray:
    """Float32 [S, z]."""
    data = storage.read(uri)
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises errors of many kinds for what it cannot read
        raise StoreError(f"{uri} cannot be read as a tensor: {type(e).__name__}") from e
    if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided):
        raise StoreError(f"{uri} holds no dense tensor of floating-point numbers")
    if tensor.ndim not in (1, 2) or 0 in tensor.shape:
        raise StoreError(f"the tensor in {uri} is {list(tensor.shape)}; it must be [S, z] or [z]")
    return tensor.detach().float().reshape(-1, tensor.shape[-1]).numpy()
