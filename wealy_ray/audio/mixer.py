"""Decoded frames of any format -> 16 kHz mono float32, with libswresample as openai-whisper uses it."""

from __future__ import annotations

from typing import Any

import av
import numpy as np

from wealy_ray.audio.windows import SAMPLE_RATE_HZ

FULL_SCALE = np.float32(32768)
"""A 16-bit sample of this size would be 1.0."""
_FLOAT_FORMATS = {"flt", "fltp", "dbl", "dblp"}
_FIRST_SAMPLES = 75 * SAMPLE_RATE_HZ  # doubled twice for five minutes


class Mixer:
    """libswresample to 16 kHz mono; a change of format in mid-stream starts a new resampler.

    The output has 16 bits, as `whisper.load_audio` asks for: only for integers does libswresample scale the
    downmix so that it cannot clip, and the same samples give the same log-mel.

    Args:
        max_samples: Samples kept; what comes after them is dropped.

    Attributes:
        has_invalid: Whether a frame held NaN or infinite samples; 16 bits cannot show that any more.
    """

    def __init__(self, max_samples: int) -> None:
        self._max_samples = max_samples
        self._num_samples = 0
        self._buffer = np.empty(min(max_samples, _FIRST_SAMPLES), np.int16)
        self.has_invalid = False
        self._resampler: Any = None
        self._input: tuple[str, str, int] | None = None

    @property
    def is_full(self) -> bool:
        """Whether `max_samples` are there."""
        return self._num_samples >= self._max_samples

    def push(self, frame: Any) -> None:
        """Resample one decoded frame."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._input:
            self.flush()
            self._resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
            self._input = kind
        if frame.format.name in _FLOAT_FORMATS and not np.isfinite(frame.to_ndarray()).all():
            self.has_invalid = True
        self._keep(self._resampler.resample(frame))

    def flush(self) -> None:
        """Fetch what the resampler still holds."""
        if self._resampler is not None:
            self._keep(self._resampler.resample(None))
        self._resampler = None
        self._input = None

    def samples(self) -> np.ndarray:
        """Return float32 `[n]`, `n <= max_samples`."""
        return self._buffer[: self._num_samples].astype(np.float32) / FULL_SCALE

    def _keep(self, frames: list[Any]) -> None:
        for frame in frames:
            chunk = frame.to_ndarray().reshape(-1)[: self._max_samples - self._num_samples]
            end = self._num_samples + len(chunk)
            while end > len(self._buffer):
                # One growing array, not thousands of chunks: those leave the heap of a child full of holes.
                grown = np.empty(min(self._max_samples, 2 * len(self._buffer)), np.int16)
                grown[: self._num_samples] = self._buffer[: self._num_samples]
                self._buffer = grown
            self._buffer[self._num_samples : end] = chunk
            self._num_samples = end
