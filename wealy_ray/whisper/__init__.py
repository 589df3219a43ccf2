"""Whisper: weights, and an engine that decodes many windows at once and keeps every decoder state."""

from wealy_ray.whisper.checkpoint import LoadedModel, load_whisper
from wealy_ray.whisper.engine import Engine
from wealy_ray.whisper.fixed_plan import decode_track, decode_tracks
from wealy_ray.whisper.reference_plan import ReferenceOptions, Transcript, transcribe_track, transcribe_tracks
from wealy_ray.whisper.request import WindowFuture
from wealy_ray.whisper.seeking import Segment, Span
from wealy_ray.whisper.types import (
    DecodeOptions,
    EngineOptions,
    EngineStats,
    Kind,
    Language,
    WindowResult,
)

__all__ = [
    "DecodeOptions",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "Kind",
    "Language",
    "LoadedModel",
    "ReferenceOptions",
    "Segment",
    "Span",
    "Transcript",
    "WindowFuture",
    "WindowResult",
    "decode_track",
    "decode_tracks",
    "load_whisper",
    "transcribe_track",
    "transcribe_tracks",
]
