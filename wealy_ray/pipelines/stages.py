"""The stages of extraction, as Ray Data runs them: fetch and decode -> engine -> shard.

The engine, which is an actor, stands in `engine_stage`; the other two, which are tasks, stand here.

Contract of every stage: one result per track; a track's own fault is a row and travels on; a fault of the run
raises. Rows travel as Arrow tables: `WORK_SCHEMA` -> `PCM_SCHEMA` -> the store's shard schema -> index rows.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from wealy_ray.audio import ByteSource, BytesSource, Decoded, IsolatedDecoder
from wealy_ray.config import AudioSettings, ExtractRecipe
from wealy_ray.errors import TrackError, TransientError
from wealy_ray.storage import ObjectForbiddenError, ObjectInfo, ObjectMissingError, Storage
from wealy_ray.store import TrackStates, write_shard

WHOLE_FETCH_BYTES = 64 << 20
"""Objects up to this size are fetched with one request; of larger ones only what the decoder asks for."""

WORK_SCHEMA = pa.schema([("track_id", pa.string()), ("audio_uri", pa.string()), ("etag", pa.string())])
PCM_SCHEMA = pa.schema(
    [
        ("track_id", pa.string()),
        ("audio_uri", pa.string()),
        ("manifest_etag", pa.string()),
        ("audio_etag", pa.string()),
        ("audio_size", pa.int64()),
        ("samples", pa.large_binary()),  # float32, 16 kHz mono; null: failed
        ("warnings", pa.list_(pa.string())),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
    ]
)
NUMERICS_COLUMN = "numerics"
"""Rides along from the engine to the shard writer: what the states were computed with."""
ENGINE_COLUMN = "engine"
"""Rides along from the engine to the driver: JSON of the engine's id and what it had counted by then."""


@dataclass(frozen=True)
class StageContext:
    """What every stage needs to know; picklable.

    Attributes:
        recipe: The resolved recipe.
        root: `<store>/<extractor-id>`.
        extractor_id: Names what changes the numbers.
        weights_digest: Of the weights that the driver saw; an engine that loads others refuses to work.
        epoch: Of the driver's claim.
    """

    recipe: ExtractRecipe
    root: str
    extractor_id: str
    weights_digest: str
    epoch: int


# ---------------------------------------------------------------- fetch and decode (tasks)

_decoders: dict[AudioSettings, IsolatedDecoder] = {}
_storages: dict[str, Storage] = {}


def storage_of(recipe: ExtractRecipe) -> Storage:
    """One per worker process: connections are worth keeping."""
    return _storages.setdefault(recipe.storage.model_dump_json(), Storage(recipe.storage))


def _decoder(audio: AudioSettings) -> IsolatedDecoder:
    if audio not in _decoders:
        _decoders[audio] = IsolatedDecoder(
            max_duration_s=audio.max_duration_s,
            timeout_s=audio.decode_timeout_s,
            memory_bytes=audio.decode_memory_mb << 20,
        )
    return _decoders[audio]


class _RemoteSource:
    """A large object, read piecewise."""

    def __init__(self, storage: Storage, info: ObjectInfo) -> None:
        self.storage, self.uri, self.size = storage, info.uri, info.size

    def read(self, offset: int, length: int) -> bytes:
        return self.storage.read_range(self.uri, offset, length)


def decode_tracks(work: pa.Table, context: StageContext) -> Iterator[pa.Table]:
    """Fetches and decodes each track of a block; yields one-row tables in `PCM_SCHEMA`.

    Raises:
        StorageError: The storage refuses the run (credentials, bucket).
        TransientError: The storage did not answer for too long.
    """
    storage, decoder = storage_of(context.recipe), _decoder(context.recipe.audio)
    for row in work.to_pylist():
        result = dict.fromkeys(PCM_SCHEMA.names)
        result |= {"track_id": row["track_id"], "audio_uri": row["audio_uri"], "manifest_etag": row["etag"]}
        try:
            info, decoded = _fetch_and_decode(storage, decoder, row["audio_uri"], result)
        except TrackError as e:
            result |= {"error_type": e.error_type, "error_message": e.message, "warnings": []}
        else:
            warnings = list(decoded.warnings)
            if row["etag"] is not None and row["etag"] != info.etag:
                warnings.append("the audio changed after the manifest was made")
            result |= {"samples": decoded.samples.tobytes(), "warnings": warnings}
        yield pa.Table.from_pylist([result], schema=PCM_SCHEMA)


def _fetch_and_decode(
    storage: Storage, decoder: IsolatedDecoder, uri: str, result: dict[str, Any]
) -> tuple[ObjectInfo, Decoded]:
    try:
        info = storage.info(uri)
        result |= {"audio_etag": info.etag, "audio_size": info.size}
        source: ByteSource = _RemoteSource(storage, info)
        if info.size <= WHOLE_FETCH_BYTES:
            source = BytesSource(storage.read(uri))
        return info, decoder.decode(source)
    except OSError as e:  # fewer bytes than the object had a moment ago
        raise TransientError(f"{uri} changed while it was read ({e}); run the same command again") from e
    except RuntimeError as e:  # the decoder's process cannot be started
        raise TransientError(f"the decoder cannot be started on {platform.node()}: {e}") from e
    except ObjectMissingError as e:
        raise TrackError("missing_object", str(e)) from e
    except ObjectForbiddenError as e:
        raise TrackError("forbidden_object", str(e)) from e


# ---------------------------------------------------------------- shard writer (tasks)


def write_tracks(batch: pa.Table, context: StageContext) -> pa.Table:
    """Writes one shard; returns its receipt, one index row per track, and `ENGINE_COLUMN`."""
    numerics = sorted(set(batch[NUMERICS_COLUMN].to_pylist()))
    rows = batch.drop_columns([NUMERICS_COLUMN, ENGINE_COLUMN])
    receipt = write_shard(
        storage_of(context.recipe),
        context.root,
        [TrackStates.from_row(rows.slice(i, 1)) for i in range(rows.num_rows)],
        extractor_id=context.extractor_id,
        epoch=context.epoch,
        numerics={"engines": "; ".join(numerics)},
    )
    return receipt.append_column(ENGINE_COLUMN, batch[ENGINE_COLUMN].combine_chunks())
