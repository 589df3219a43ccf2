"""The `reference` window plan: `whisper.transcribe`, window by window, for many tracks at once.

Within a track everything is sequential: a window begins where the last one's final timestamp says, and takes
its text as context. Each track is a coroutine, and the engine batches the windows of all tracks in flight.

What WEALY's authors stored is kept: states of all initial positions, of windows that are skipped as "no
speech" afterwards, and of the accepted attempt only. With fallback, results equal stock's up to a track's
first sampled window; from there on the draws are ours, seeded by window and attempt.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from whisper.audio import N_FRAMES, N_SAMPLES, SAMPLE_RATE, log_mel_spectrogram, pad_or_trim

from wealy_ray.errors import ConfigError
from wealy_ray.whisper.engine import Engine
from wealy_ray.whisper.seeking import Seeker, Segment, Span
from wealy_ray.whisper.types import Language, WindowResult

RESET_ABOVE = 0.5
"""Text sampled at a higher temperature is not given to the next window as context."""


@dataclass(frozen=True)
class ReferenceOptions:
    """Settings of `whisper.transcribe`, by its names and with its defaults.

    Raises:
        ConfigError: No temperature, or one below 0.
    """

    condition_on_previous_text: bool = True
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Tried in turn until an attempt is accepted; the last one is taken as it is. `(0.0,)` is fallback off."""
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    pad_to_s: float | None = None
    """Shorter tracks are padded with silence to this length before anything else; WEALY's authors used 300."""
    seed: int = 0
    """Of the draws at temperatures above 0."""

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise ConfigError(
                f"temperatures is {list(self.temperatures)}; it must hold numbers of at least 0, and at least one"
            )

    def needs_fallback(self, result: WindowResult) -> bool:
        """Whether an attempt is to be repeated at the next temperature."""
        is_improbable = self.logprob_threshold is not None and result.avg_logprob < self.logprob_threshold
        is_silent = self.no_speech_threshold is not None and result.no_speech_prob > self.no_speech_threshold
        if is_improbable and is_silent:
            return False
        is_repetitive = (
            self.compression_ratio_threshold is not None
            and result.compression_ratio > self.compression_ratio_threshold
        )
        return is_repetitive or is_improbable

    def skips(self, result: WindowResult) -> bool:
        """Whether a window's text is dropped as "no speech"."""
        if self.no_speech_threshold is None or result.no_speech_prob <= self.no_speech_threshold:
            return False
        return self.logprob_threshold is None or result.avg_logprob <= self.logprob_threshold


@dataclass(eq=False)
class Transcript:
    """A track as `whisper.transcribe` hears it, with every window's states."""

    language: Language
    results: list[WindowResult] = field(default_factory=list)
    """The accepted attempt of each window, skipped ones included."""
    spans: list[Span] = field(default_factory=list)
    """Where each window lies."""
    segments: list[Segment] = field(default_factory=list)
    text: str = ""


async def transcribe_track(engine: Engine, samples: np.ndarray, options: ReferenceOptions) -> Transcript:
    """Decode one track.

    Args:
        engine: A started engine, shared with other tracks. Its `DecodeOptions` say language, task and initial
            prompt; `timestamps` should be on, else every window is 30 s.
        samples: float32 [n], 16 kHz mono.
        options: How.

    Returns:
        The transcript.

    Raises:
        RuntimeError: When the engine is closed or fails.
    """
    mel_MN = await asyncio.to_thread(_log_mel, engine, samples, options.pad_to_s)
    num_frames = mel_MN.shape[1] - N_FRAMES  # content; the rest is padding
    language, first_window = await _language(engine, mel_MN, num_frames)
    transcript = Transcript(language)
    seeker = Seeker(engine.vocabulary, engine.dims)
    context = list(engine.prompt)
    reset_at = seek = 0
    while seek < num_frames:
        span = Span(seek, min(N_FRAMES, num_frames - seek))
        window = pad_or_trim(mel_MN[:, seek : seek + span.size], N_FRAMES).contiguous()
        if seek == 0 and first_window is not None:
            window = first_window
        result = await _decode_with_fallback(
            engine, window, language.code, context[reset_at:], options, index=len(transcript.results)
        )
        transcript.results.append(result)
        transcript.spans.append(span)
        if options.skips(result):
            seek += span.size
            continue
        segments, seek = seeker.cut(span, result.tokens)
        transcript.segments.extend(segments)
        context.extend(token for segment in segments for token in segment.tokens)
        if not options.condition_on_previous_text or result.temperature > RESET_ABOVE:
            reset_at = len(context)
    if transcript.results and engine.decode.language is not None:
        transcript.language = Language(language.code, transcript.results[0].language_probability)
    transcript.text = engine.vocabulary.tokenizer.decode(context[len(engine.prompt) :])
    return transcript


def transcribe_tracks(
    engine: Engine, tracks: Sequence[np.ndarray], options: ReferenceOptions
) -> list[Transcript]:
    """Decode several tracks at once, without asyncio.

    Args:
        engine: A started engine.
        tracks: Samples of each track, as for `transcribe_track`.
        options: How.

    Returns:
        One transcript per track, in order.

    Raises:
        RuntimeError: When the engine is closed or fails.
    """

    async def all_of_them() -> list[Transcript]:
        return await asyncio.gather(*(transcribe_track(engine, samples, options) for samples in tracks))

    return asyncio.run(all_of_them())


def _log_mel(engine: Engine, samples: np.ndarray, pad_to_s: float | None) -> Tensor:
    """Features of the whole track and 30 s of silence behind it.

    The maximum that they are clamped by is the track's, as in `whisper.transcribe`.
    """
    if pad_to_s is not None:
        missing = max(0, round(pad_to_s * SAMPLE_RATE) - len(samples))
        samples = np.pad(samples, (0, missing))
    audio = torch.from_numpy(np.ascontiguousarray(samples, np.float32))
    with engine.feature_gate:
        mel = log_mel_spectrogram(audio, engine.dims.n_mels, padding=N_SAMPLES, device=engine.device)
        return mel.cpu()  # a track waits long for its later windows: not on the device


async def _language(engine: Engine, mel_MN: Tensor, num_frames: int) -> tuple[Language, Tensor | None]:
    """A track's language, and its first window's features where they had to be made.

    Whisper detects it on the first 30 s; where the track is shorter, these go on with the padding's features,
    while its window goes on with zeros.
    """
    if engine.decode.language is not None:
        return Language(engine.decode.language, 1.0), None
    start = pad_or_trim(mel_MN, N_FRAMES).contiguous()
    if num_frames < N_FRAMES:
        return await asyncio.wrap_future(engine.detect_language(start)), None
    features_AD = await asyncio.wrap_future(engine.encode(start))
    return await asyncio.wrap_future(engine.detect_language(features_AD)), features_AD


async def _decode_with_fallback(
    engine: Engine,
    window: Tensor,
    language: str,
    context: list[int],
    options: ReferenceOptions,
    *,
    index: int,
) -> WindowResult:
    is_encoded = window.shape[0] == engine.dims.n_audio_ctx
    if len(options.temperatures) > 1 and not is_encoded:  # the features serve every attempt
        window = await asyncio.wrap_future(engine.encode(window))
    for attempt, temperature in enumerate(options.temperatures):
        future = engine.submit(
            window,
            language,
            prompt=context,
            temperature=temperature,
            seed=_seed(options.seed, index, attempt),
        )
        result = await asyncio.wrap_future(future)
        if not options.needs_fallback(result):
            break
    return result


def _seed(*numbers: int) -> int:
    """Other draws for every window and attempt, the same ones in every run."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
