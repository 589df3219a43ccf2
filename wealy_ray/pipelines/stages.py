"""The stages of extraction, as Ray Data runs them: fetch and decode -> engine -> shard.

Contract of every stage: one result per track; a track's own fault is a row and travels on; a fault of the run
raises. Rows travel as Arrow tables: `WORK_SCHEMA` -> `PCM_SCHEMA` -> the store's shard schema -> index rows.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from wealy_ray.audio import ByteSource, BytesSource, Decoded, IsolatedDecoder, plan_windows
from wealy_ray.config import WINDOW_S, AudioSettings, ExtractRecipe
from wealy_ray.errors import ClusterError, ModelError, TrackError, TransientError, WealyError
from wealy_ray.pipelines.flight import FlightRecorder
from wealy_ray.storage import ObjectForbiddenError, ObjectInfo, ObjectMissingError, Storage
from wealy_ray.store import TrackStates, WindowInfo, write_shard

if TYPE_CHECKING:
    from wealy_ray.whisper.types import WindowResult

SAMPLE_RATE_HZ = 16_000
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


def _storage(recipe: ExtractRecipe) -> Storage:
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
    storage, decoder = _storage(context.recipe), _decoder(context.recipe.audio)
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


# ---------------------------------------------------------------- engine (actors)


class EngineStage:
    """Owns one Whisper engine; several blocks are in flight at a time, so that its slots stay full."""

    def __init__(self, context: StageContext, use_gpu: bool, alone: bool = False) -> None:
        import ray

        self.context = context
        actor_id = str(ray.get_runtime_context().get_actor_id())
        self.recorder = None if alone else FlightRecorder(_storage(context.recipe), context.root, actor_id)
        self.fault: WealyError | None = None
        try:
            self._start(use_gpu)
        except WealyError as e:
            self.fault = e  # raised by the first call: Ray keeps only the text of a constructor's error

    def _start(self, use_gpu: bool) -> None:
        import torch

        from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, load_whisper

        recipe = self.context.recipe
        engine, decode = recipe.engine, recipe.decode
        torch.set_num_threads(engine.num_threads or math.ceil(recipe.resources.engine_cpus))
        loaded = load_whisper(recipe.model, read_bytes=_storage(recipe).read)
        if loaded.digest != self.context.weights_digest:
            raise ModelError(
                f"the weights of '{recipe.model}' on this node differ from those the job was started with; "
                "give every node the same file, or name the weights by a URI"
            )
        device = ("cuda" if use_gpu else "cpu") if engine.device == "auto" else engine.device
        self.n_mels = loaded.model.dims.n_mels
        self.engine = Engine(
            loaded.model,
            EngineOptions(
                device=device,
                dtype=engine.dtype,
                num_slots=engine.num_slots,
                encoder_batch=engine.encoder_batch,
            ),
            DecodeOptions(
                language=decode.language,
                task=decode.task,
                timestamps=decode.timestamps,
                max_tokens=decode.max_tokens,
            ),
        )
        try:
            self.engine.start().wait_until_ready()
        except RuntimeError as e:
            raise ClusterError(
                f"the engine cannot start on {platform.node()} ({e.__cause__}); lower engine.num_slots or "
                "engine.encoder_batch, or give it a larger device"
            ) from e
        self.numerics = f"{device} {self.engine.dtype} slots={engine.num_slots} torch={torch.__version__}"

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """`PCM_SCHEMA` -> shard schema plus `NUMERICS_COLUMN`; one row per track, in order."""
        if self.fault is not None:
            raise self.fault
        ids = batch["track_id"].to_pylist()
        if self.recorder:
            await asyncio.to_thread(self.recorder.begin, ids)
        tracks = await asyncio.gather(*(self._extract(batch.slice(i, 1)) for i in range(len(ids))))
        if self.recorder:
            await asyncio.to_thread(self.recorder.end, ids)
        table = pa.concat_tables([track.to_row(pa.py_buffer(track.states.tobytes())) for track in tracks])
        return table.append_column(NUMERICS_COLUMN, pa.array([self.numerics] * len(ids), pa.string()))

    async def _extract(self, row: pa.Table) -> TrackStates:
        from wealy_ray.audio.mel import log_mel_windows
        from wealy_ray.whisper import decode_track

        fields = {name: row[name][0].as_py() for name in PCM_SCHEMA.names if name != "samples"}
        if fields["error_type"] is not None:
            return _failed_track(fields)
        samples = np.frombuffer(row["samples"][0].as_buffer(), np.float32)
        windows = plan_windows(len(samples), self.context.recipe.windows.hop_s)
        mels = await asyncio.to_thread(log_mel_windows, samples, windows, n_mels=self.n_mels)
        try:
            results = await decode_track(self.engine, mels)
        except Exception:
            if self.engine.has_failed:
                # the device may be beyond use (out of memory, a fault): end like any dead engine, so that Ray
                # starts another one, and so that the flight record names a track that does this again
                logging.getLogger(__name__).exception("the engine failed; ending its process")
                os._exit(1)
            raise
        starts_s = [window.start / SAMPLE_RATE_HZ for window in windows]
        return _ok_track(fields, len(samples) / SAMPLE_RATE_HZ, starts_s, results)


def _failed_track(fields: dict[str, Any]) -> TrackStates:
    return TrackStates.failed(
        track_id=fields["track_id"],
        audio_uri=fields["audio_uri"],
        audio_etag=fields["audio_etag"],
        audio_size=fields["audio_size"],
        manifest_etag=fields["manifest_etag"],
        error_type=fields["error_type"],
        error_message=fields["error_message"],
    )


def _ok_track(
    fields: dict[str, Any], duration_s: float, starts_s: list[float], results: list[WindowResult]
) -> TrackStates:
    lengths = [len(r.states) for r in results]
    return TrackStates(
        track_id=fields["track_id"],
        audio_uri=fields["audio_uri"],
        audio_etag=fields["audio_etag"],
        audio_size=fields["audio_size"],
        manifest_etag=fields["manifest_etag"],
        status="ok",
        error_type=None,
        error_message=None,
        warnings=tuple(fields["warnings"]),
        duration_s=duration_s,
        language=results[0].language,
        language_probability=results[0].language_probability,
        states=np.concatenate([r.states for r in results]).astype(np.float16),
        token_ids=np.concatenate([r.token_ids for r in results]),
        kind=np.concatenate([r.kinds for r in results]),
        window=np.repeat(np.arange(len(results), dtype=np.int16), lengths),
        windows=tuple(
            WindowInfo(
                start_s=start_s,
                end_s=min(start_s + WINDOW_S, duration_s),
                language=r.language,
                text=r.text,
                no_speech_prob=r.no_speech_prob,
                avg_logprob=r.avg_logprob,
                compression_ratio=r.compression_ratio,
                temperature=r.temperature,
            )
            for start_s, r in zip(starts_s, results, strict=True)
        ),
        text=" ".join(r.text for r in results if r.text),
    )


# ---------------------------------------------------------------- shard writer (tasks)


def write_tracks(batch: pa.Table, context: StageContext) -> pa.Table:
    """Writes one shard; returns its receipt, one index row per track."""
    numerics = sorted(set(batch[NUMERICS_COLUMN].to_pylist()))
    rows = batch.drop_columns([NUMERICS_COLUMN])
    return write_shard(
        _storage(context.recipe),
        context.root,
        [TrackStates.from_row(rows.slice(i, 1)) for i in range(rows.num_rows)],
        extractor_id=context.extractor_id,
        epoch=context.epoch,
        numerics={"engines": "; ".join(numerics)},
    )


class SoloExtractor:
    """All three stages in one process, one track at a time: for tracks under suspicion."""

    def __init__(self, context: StageContext, use_gpu: bool) -> None:
        self.context = context
        self.stage = EngineStage(context, use_gpu, alone=True)

    async def node_id(self) -> str:
        """Where this runs."""
        import ray

        return ray.get_runtime_context().get_node_id()

    async def extract(self, work: pa.Table) -> pa.Table:
        """One row in `WORK_SCHEMA` -> its receipt, after the shard was written."""
        (pcm,) = await asyncio.to_thread(lambda: list(decode_tracks(work, self.context)))
        return await asyncio.to_thread(write_tracks, await self.stage(pcm), self.context)
