"""The engine's stage of extraction: an actor that owns one Whisper engine and hears whole tracks."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import platform
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from wealy_ray.audio import SAMPLE_RATE_HZ, plan_windows
from wealy_ray.config import WINDOW_S, ExtractRecipe, ReferenceWindows
from wealy_ray.errors import ClusterError, ModelError, TrackError, WealyError
from wealy_ray.pipelines.flight import FlightRecorder
from wealy_ray.pipelines.stages import (
    ENGINE_COLUMN,
    NUMERICS_COLUMN,
    PCM_SCHEMA,
    StageContext,
    decode_tracks,
    storage_of,
    write_tracks,
)
from wealy_ray.store import TrackStates, WindowInfo

if TYPE_CHECKING:
    from torch import Tensor

    from wealy_ray.whisper import DecodeOptions, Engine, Language, WindowResult


def decode_options(recipe: ExtractRecipe) -> DecodeOptions:
    """What the engine is to decode."""
    from wealy_ray.whisper import DecodeOptions

    return DecodeOptions(**recipe.decode.model_dump(exclude={"timestamps"}), timestamps=recipe.timestamps)


@dataclass(frozen=True)
class Heard:
    """A track after the engine, by either window plan."""

    language: Language | None
    """None where there was not a single window to detect it in."""
    results: list[WindowResult]
    spans_s: list[tuple[float, float]]
    """Start and end of each window in seconds."""
    text: str


async def hear(engine: Engine, samples: np.ndarray, recipe: ExtractRecipe) -> Heard:
    """Decode a track as the recipe's window plan says.

    Args:
        engine: Started; its `DecodeOptions` are the recipe's.
        samples: float32 [n], 16 kHz mono.
        recipe: The job.
    """
    if isinstance(recipe.windows, ReferenceWindows):
        return await _hear_as_reference(engine, samples, recipe.windows)
    return await _hear_fixed_windows(engine, samples, recipe.windows.hop_s)


async def _hear_fixed_windows(engine: Engine, samples: np.ndarray, hop_s: float) -> Heard:
    from wealy_ray.audio.mel import log_mel_windows
    from wealy_ray.whisper import Language, decode_track

    windows = plan_windows(len(samples), hop_s)

    def log_mels() -> Tensor:
        with engine.feature_gate:
            mels = log_mel_windows(samples, windows, n_mels=engine.dims.n_mels, device=engine.device)
            return mels.cpu()  # most wait for a slot: not on the device

    mels = await asyncio.to_thread(log_mels)
    results = await decode_track(engine, mels)
    starts_s = [window.start / SAMPLE_RATE_HZ for window in windows]
    duration_s = len(samples) / SAMPLE_RATE_HZ
    return Heard(
        language=Language(results[0].language, results[0].language_probability),
        results=results,
        spans_s=[(start_s, min(start_s + WINDOW_S, duration_s)) for start_s in starts_s],
        text=" ".join(result.text for result in results if result.text),
    )


async def _hear_as_reference(engine: Engine, samples: np.ndarray, windows: ReferenceWindows) -> Heard:
    from wealy_ray.whisper import ReferenceOptions, transcribe_track
    from wealy_ray.whisper.seeking import seconds

    options = ReferenceOptions(**windows.model_dump(exclude={"plan"}))
    transcript = await transcribe_track(engine, samples, options)
    return Heard(
        language=transcript.language,
        results=transcript.results,
        spans_s=[(seconds(span.seek), seconds(span.seek + span.size)) for span in transcript.spans],
        text=transcript.text.strip(),
    )


class EngineStage:
    """Owns one Whisper engine; several blocks are in flight at a time, so that its slots stay full."""

    def __init__(self, context: StageContext, use_gpu: bool, alone: bool = False) -> None:
        import ray

        self.context = context
        self.id = uuid.uuid4().hex[:8]
        actor_id = str(ray.get_runtime_context().get_actor_id())
        self.recorder = None if alone else FlightRecorder(storage_of(context.recipe), context.root, actor_id)
        self.fault: WealyError | None = None
        try:
            self._start(use_gpu)
        except WealyError as e:
            self.fault = e  # raised by the first call: Ray keeps only the text of a constructor's error

    def _start(self, use_gpu: bool) -> None:
        import torch

        from wealy_ray.whisper import Engine, EngineOptions, load_whisper

        recipe = self.context.recipe
        engine = recipe.engine
        torch.set_num_threads(engine.num_threads or math.ceil(recipe.resources.engine_cpus))
        loaded = load_whisper(recipe.model, read_bytes=storage_of(recipe).read)
        if loaded.digest != self.context.weights_digest:
            raise ModelError(
                f"the weights of '{recipe.model}' on this node differ from those the job was started with; "
                "give every node the same file, or name the weights by a URI"
            )
        device = ("cuda" if use_gpu else "cpu") if engine.device == "auto" else engine.device
        options = EngineOptions(
            device=device, dtype=engine.dtype, num_slots=engine.num_slots, encoder_batch=engine.encoder_batch
        )
        self.engine = Engine(loaded.model, options, decode_options(recipe))
        try:
            self.engine.start().wait_until_ready()
        except RuntimeError as e:
            raise ClusterError(
                f"the engine cannot start on {platform.node()} ({e.__cause__}); lower engine.num_slots or "
                "engine.encoder_batch, or give it a larger device"
            ) from e

    def _numerics(self) -> str:
        """What may change rounding, as it is now: an engine that ran out of memory has fewer slots."""
        import torch

        engine = self.engine
        return f"{engine.device.type} {engine.dtype} slots={engine.num_slots} torch={torch.__version__}"

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """`PCM_SCHEMA` -> shard schema and the columns that ride along; one row per track, in order."""
        if self.fault is not None:
            raise self.fault
        ids = batch["track_id"].to_pylist()
        if self.recorder:
            await asyncio.to_thread(self.recorder.begin, ids)
        tracks = await asyncio.gather(*(self._extract(batch.slice(i, 1)) for i in range(len(ids))))
        if self.recorder:
            await asyncio.to_thread(self.recorder.end, ids)
        table = pa.concat_tables([track.to_row(pa.py_buffer(track.states.tobytes())) for track in tracks])
        report = json.dumps({"engine": self.id, **asdict(self.engine.stats())})
        for name, value in ((NUMERICS_COLUMN, self._numerics()), (ENGINE_COLUMN, report)):
            table = table.append_column(name, pa.array([value] * len(ids), pa.string()))
        return table

    async def _extract(self, row: pa.Table) -> TrackStates:
        from wealy_ray.whisper.backend import is_out_of_memory

        fields = {name: row[name][0].as_py() for name in PCM_SCHEMA.names if name != "samples"}
        if fields["error_type"] is not None:
            return failed_track(fields)
        samples = np.frombuffer(row["samples"][0].as_buffer(), np.float32)
        try:
            heard = await hear(self.engine, samples, self.context.recipe)
        except Exception as e:
            if self.engine.has_failed or is_out_of_memory(e):
                # the device may be beyond use (out of memory, a fault): end like any dead engine, so that Ray
                # starts another one, and so that the flight record names a track that does this again
                logging.getLogger(__name__).exception("the engine failed; ending its process")
                os._exit(1)
            raise
        try:
            return ok_track(fields, len(samples) / SAMPLE_RATE_HZ, heard, self.engine.dims.n_text_state)
        except TrackError as e:
            return failed_track({**fields, "error_type": e.error_type, "error_message": e.message})


def failed_track(fields: dict[str, Any]) -> TrackStates:
    """A failed track from the columns of `PCM_SCHEMA` but `samples`."""
    return TrackStates.failed(
        track_id=fields["track_id"],
        audio_uri=fields["audio_uri"],
        audio_etag=fields["audio_etag"],
        audio_size=fields["audio_size"],
        manifest_etag=fields["manifest_etag"],
        error_type=fields["error_type"],
        error_message=fields["error_message"],
    )


def ok_track(fields: dict[str, Any], duration_s: float, heard: Heard, dim: int) -> TrackStates:
    """A heard track.

    Args:
        fields: Columns of `PCM_SCHEMA` but `samples`.
        duration_s: Seconds that were heard.
        heard: What the engine gave.
        dim: Width of a state.

    Raises:
        TrackError: States that cannot be stored.
    """
    results = heard.results
    loops = [
        f"window {number} repeated itself and was ended after {len(result.tokens)} tokens"
        for number, result in enumerate(results)
        if result.ended == "repetition"
    ]
    if len(results) > np.iinfo(np.int16).max:
        raise TrackError(
            "too_many_windows", f"the track has {len(results)} windows; a row numbers them up to 32767"
        )
    lengths = [len(result.states) for result in results]
    with np.errstate(over="ignore"):
        halves = [result.states.astype(np.float16) for result in results]
    states = np.concatenate([np.zeros((0, dim), np.float16), *halves])
    if not np.isfinite(states).all():
        raise TrackError("invalid_states", "the track has states that are NaN, or too large for float16")
    return TrackStates(
        track_id=fields["track_id"],
        audio_uri=fields["audio_uri"],
        audio_etag=fields["audio_etag"],
        audio_size=fields["audio_size"],
        manifest_etag=fields["manifest_etag"],
        warnings=(*fields["warnings"], *loops),
        duration_s=duration_s,
        language=heard.language.code if heard.language else None,
        language_probability=heard.language.probability if heard.language else None,
        states=states,
        token_ids=np.concatenate([np.zeros(0, np.int32), *(r.token_ids for r in results)]),
        kind=np.concatenate([np.zeros(0, np.int8), *(r.kinds for r in results)]),
        window=np.repeat(np.arange(len(results), dtype=np.int16), lengths),
        windows=tuple(
            WindowInfo(
                start_s=start_s,
                end_s=end_s,
                language=result.language,
                text=result.text,
                no_speech_prob=result.no_speech_prob,
                avg_logprob=result.avg_logprob,
                compression_ratio=result.compression_ratio,
                temperature=result.temperature,
            )
            for (start_s, end_s), result in zip(heard.spans_s, results, strict=True)
        ),
        text=heard.text,
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
