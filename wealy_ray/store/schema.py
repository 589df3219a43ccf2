"""What a shard and an index hold: one track's result, and the columns of both Parquet files.

Kinds are int8 roles of states (prompt, sot, text, timestamp, eot); their names live with the Whisper engine.
The store only keeps them, and their run lengths in the index, so that a crop can be filtered before any byte
is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

FORMAT_VERSION = "1"
"""Version of the layout of shards and indexes; a reader refuses others."""

STATES_DTYPE = np.dtype("<f2")
"""States on disk: IEEE half precision, little-endian, row-major."""


LISTS = {"token_ids": np.int32, "kind": np.int8, "window": np.int16}
"""Columns that say something about each state."""


@dataclass(frozen=True)
class WindowInfo:
    """One Whisper window of a track.

    Attributes:
        start_s: Start within the track, in seconds.
        end_s: End within the track, in seconds.
        language: Whisper language code.
        text: What was decoded.
        no_speech_prob: Probability of the no-speech token.
        avg_logprob: Mean log-probability of the sampled tokens.
        compression_ratio: Length of the text over its zlib-compressed length.
        temperature: Sampling temperature.
    """

    start_s: float
    end_s: float
    language: str | None
    text: str
    no_speech_prob: float
    avg_logprob: float
    compression_ratio: float
    temperature: float


def _no_states() -> np.ndarray:
    return np.zeros((0, 0), np.float16)


@dataclass(frozen=True, eq=False)
class TrackStates:
    """One track's result, ok or failed: a row of a shard.

    Attributes:
        track_id: Stable id of the manifest.
        audio_uri: Where the audio was read.
        audio_etag: Version of the audio as read.
        audio_size: Bytes of the audio as read.
        manifest_etag: Version that the manifest asked for.
        status: "ok" or "failed".
        error_type: One of `errors.TRACK_ERROR_TYPES`, failed tracks only.
        error_message: One sentence, failed tracks only.
        warnings: Sentences about an ok track, e.g. "truncated after 41.2 s".
        duration_s: Seconds of audio that were used.
        language: Whisper language code of the track.
        language_probability: Its probability.
        dtype: Element type of `states`, "float16".
        states: float16 [num_states, dim].
        token_ids: int32 [num_states], the token that each state predicts (leading positions: the token fed).
        kind: int8 [num_states], role of each state.
        window: int16 [num_states], index into `windows`.
        windows: The windows in order of their start.
        text: The transcript.
    """

    track_id: str
    audio_uri: str
    audio_etag: str | None = None
    audio_size: int | None = None
    manifest_etag: str | None = None
    status: str = "ok"
    error_type: str | None = None
    error_message: str | None = None
    warnings: tuple[str, ...] = ()
    duration_s: float | None = None
    language: str | None = None
    language_probability: float | None = None
    dtype: str = "float16"
    states: np.ndarray = field(default_factory=_no_states)
    token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    kind: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    window: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    windows: Sequence[WindowInfo] = ()
    text: str = ""

    def __post_init__(self) -> None:
        assert self.status in ("ok", "failed"), self.status
        assert (self.error_type is not None) == (self.status == "failed"), self.track_id
        assert self.states.ndim == 2, self.states.shape
        assert self.states.dtype == np.float16, self.states.dtype
        assert self.dtype == "float16", self.dtype
        for array in (self.token_ids, self.kind, self.window):
            assert array.shape == (self.num_states,), (self.track_id, array.shape, self.num_states)

    @classmethod
    def failed(
        cls,
        track_id: str,
        audio_uri: str,
        error_type: str,
        error_message: str,
        *,
        audio_etag: str | None = None,
        audio_size: int | None = None,
        manifest_etag: str | None = None,
    ) -> TrackStates:
        """A track that could not be worked on: no states, a reason."""
        return cls(
            track_id,
            audio_uri,
            audio_etag,
            audio_size,
            manifest_etag,
            status="failed",
            error_type=error_type,
            error_message=error_message,
        )

    @property
    def num_states(self) -> int:
        """Rows of `states`."""
        return int(self.states.shape[0])

    @property
    def dim(self) -> int:
        """Width of one state; 0 for a failed track."""
        return int(self.states.shape[1])

    def to_row(self, payload: pa.Buffer) -> pa.Table:
        """The track as a table of one row with `SHARD_SCHEMA`; `payload` holds the bytes of `states`."""
        offsets = pa.py_buffer(np.array([0, payload.size], np.int64))
        # a view, not a copy: one track holds megabytes
        special = {"states": pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, payload])}
        for name in LISTS:
            special[name] = _one_list(getattr(self, name), SHARD_SCHEMA.field(name).type)
        plain: dict[str, Any] = {
            "windows": [{**asdict(w), "text": _valid_text(w.text)} for w in self.windows],
            "warnings": [_valid_text(w) for w in self.warnings],
            "error_message": None if self.error_message is None else _valid_text(self.error_message),
            "text": _valid_text(self.text),
        }
        columns = [
            special[f.name]
            if f.name in special
            else pa.array([plain[f.name] if f.name in plain else getattr(self, f.name)], f.type)
            for f in SHARD_SCHEMA
        ]
        return pa.Table.from_arrays(columns, schema=SHARD_SCHEMA)

    @classmethod
    def from_row(cls, row: pa.Table) -> TrackStates:
        """The opposite of `to_row`; what was read of `WITHOUT_STATES` only becomes a track without states."""
        assert row.num_rows == 1
        values: dict[str, Any] = {name: row[name][0].as_py() for name in WITHOUT_STATES}
        if "states" in row.column_names:
            values["states"] = states_of(row["states"][0].as_buffer(), row["dim"][0].as_py())
            for name, dtype in LISTS.items():
                values[name] = _values(row[name]).astype(dtype)
        values["warnings"] = tuple(values["warnings"])
        values["windows"] = tuple(WindowInfo(**w) for w in values["windows"])
        return cls(**values)


WITHOUT_STATES = [f.name for f in fields(TrackStates) if f.name not in ("states", *LISTS)]
"""Columns that say something about a track as a whole."""

WINDOW_TYPE = pa.struct(
    [
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("language", pa.string()),
        ("text", pa.string()),
        ("no_speech_prob", pa.float32()),
        ("avg_logprob", pa.float32()),
        ("compression_ratio", pa.float32()),
        ("temperature", pa.float32()),
    ]
)

SHARD_SCHEMA = pa.schema(
    [
        ("track_id", pa.string()),
        ("audio_uri", pa.string()),
        ("audio_etag", pa.string()),
        ("audio_size", pa.int64()),
        ("manifest_etag", pa.string()),
        ("status", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("warnings", pa.list_(pa.string())),
        ("duration_s", pa.float64()),
        ("language", pa.string()),
        ("language_probability", pa.float32()),
        ("num_states", pa.int32()),
        ("dim", pa.int32()),
        ("dtype", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("kind", pa.list_(pa.int8())),
        ("window", pa.list_(pa.int16())),
        ("windows", pa.list_(WINDOW_TYPE)),
        ("text", pa.string()),
        # The last column, so that a row group ends with its payload: its offset is known once it is written.
        ("states", pa.large_binary()),
    ]
)
"""Columns of a shard; one track per row and row group."""

INDEX_SCHEMA = pa.schema(
    [
        ("track_id", pa.string()),
        ("status", pa.string()),
        ("error_type", pa.string()),
        ("audio_uri", pa.string()),
        ("audio_etag", pa.string()),
        ("audio_size", pa.int64()),
        ("manifest_etag", pa.string()),
        ("duration_s", pa.float64()),
        ("language", pa.string()),
        ("num_windows", pa.int32()),
        ("shard", pa.string()),
        ("shard_bytes", pa.int64()),
        ("row", pa.int32()),
        ("payload_offset", pa.int64()),
        ("num_states", pa.int32()),
        ("dim", pa.int32()),
        ("kind_runs", pa.list_(pa.int32())),
        ("checksum", pa.string()),
    ]
)
"""Columns of an index, and of the receipt that a shard's writer returns."""


def checksum_of(payload: bytes | memoryview | pa.Buffer) -> str:
    """BLAKE2b of 16 bytes, as 32 hexadecimal digits."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def states_of(payload: bytes | pa.Buffer, dim: int) -> np.ndarray:
    """Bytes as states: float16 [num_states, dim], read-only."""
    return np.frombuffer(payload, STATES_DTYPE).reshape(-1 if dim else 0, dim)


def runs_of(kind: np.ndarray) -> list[int]:
    """Run lengths of `kind` (int8 [n]) as alternating kind, length."""
    if not len(kind):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(kind)) + 1])
    lengths = np.diff(np.append(starts, len(kind)))
    return np.stack([kind[starts].astype(np.int32), lengths.astype(np.int32)], axis=1).ravel().tolist()


def kinds_of(runs: Sequence[int] | np.ndarray) -> np.ndarray:
    """The opposite of `runs_of`: int8 [n]."""
    pairs = np.asarray(runs, np.int32).reshape(-1, 2)
    return np.repeat(pairs[:, 0].astype(np.int8), pairs[:, 1])


def _one_list(values: np.ndarray, list_type: pa.DataType) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, list_type.value_type.to_pandas_dtype()))
    return pa.ListArray.from_arrays(pa.array([0, len(flat)], pa.int32()), flat)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of a list column of one row."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _valid_text(text: str) -> str:
    """Text that UTF-8 can hold: a stray surrogate in a message must not cost a whole shard."""
    return text.encode("utf-8", "replace").decode("utf-8")
