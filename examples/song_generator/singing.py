"""Makes a spoken line sing: WORLD takes the voice apart and puts it together with another pitch and pace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.song_generator.voices import SAMPLE_RATE_HZ

FRAME_S = 0.005
"""WORLD's default distance of two frames."""
VIBRATO_HZ, VIBRATO_SEMITONES = 5.5, 0.25
GLIDE_FRAMES = 13


def sing(
    x: np.ndarray, notes: Sequence[int], *, sung: float, base_hz: float, stretch: float, warp: float
) -> np.ndarray:
    """Pulls a voice towards a melody.

    Args:
        x: The spoken line, float32 [num_samples].
        notes: Semitones above `base_hz`, of equal length.
        sung: Share of the melody in the pitch; the rest is the voice's own intonation around `base_hz`.
        base_hz: Where the voice lies.
        stretch: Factor of the duration.
        warp: Factor of the formants' frequencies.

    Returns:
        float32 [num_samples * stretch, about], peak .9.
    """
    import pyworld

    x = x.astype(np.float64)
    f0, times = pyworld.dio(x, SAMPLE_RATE_HZ, f0_floor=65, f0_ceil=500)
    f0 = pyworld.stonemask(x, f0, times, SAMPLE_RATE_HZ)
    envelope = pyworld.cheaptrick(x, f0, times, SAMPLE_RATE_HZ)
    aperiodicity = pyworld.d4c(x, f0, times, SAMPLE_RATE_HZ)

    num_frames = max(2, round(len(f0) * stretch))
    nearest = np.round(np.linspace(0, len(f0) - 1, num_frames)).astype(int)
    f0, envelope, aperiodicity = f0[nearest], envelope[nearest], aperiodicity[nearest]
    if warp != 1.0:
        envelope = _warp(envelope, warp)
    voiced = f0 > 0
    if voiced.any():
        target = np.log(base_hz) + _melody(notes, num_frames) * np.log(2) / 12
        own = np.log(f0[voiced] / np.exp(np.log(f0[voiced]).mean())) + np.log(base_hz)
        f0[voiced] = np.exp(sung * target[voiced] + (1 - sung) * own)
    y = pyworld.synthesize(f0, envelope, np.ascontiguousarray(aperiodicity), SAMPLE_RATE_HZ)
    return (y / (np.abs(y).max() + 1e-9) * 0.9).astype(np.float32)


def _melody(notes: Sequence[int], num_frames: int) -> np.ndarray:
    """Semitones by frame, float64 [num_frames], with glides between notes and a vibrato."""
    steps = np.repeat(np.asarray(notes, float), int(np.ceil(num_frames / len(notes))))[:num_frames]
    steps = np.pad(steps, GLIDE_FRAMES // 2, mode="edge")
    glides = np.convolve(steps, np.ones(GLIDE_FRAMES) / GLIDE_FRAMES, "valid")
    return glides + VIBRATO_SEMITONES * np.sin(2 * np.pi * VIBRATO_HZ * np.arange(num_frames) * FRAME_S)


def _warp(envelope: np.ndarray, warp: float) -> np.ndarray:
    """Stretches each frame's spectrum along frequency, with linear interpolation."""
    num_bins = envelope.shape[1]
    source = np.clip(np.arange(num_bins) / warp, 0, num_bins - 1)
    low = source.astype(int)
    high = np.minimum(low + 1, num_bins - 1)
    weight = source - low
    return np.ascontiguousarray(envelope[:, low] * (1 - weight) + envelope[:, high] * weight)
