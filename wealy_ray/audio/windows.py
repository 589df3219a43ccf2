"""The fixed window plan: independent 30 s windows, one every `hop_s`."""

from __future__ import annotations

from typing import NamedTuple

SAMPLE_RATE_HZ = 16_000
WINDOW_S = 30.0
WINDOW_SAMPLES = 480_000  # 30 s * 16,000 Hz: what Whisper's encoder takes


class Window(NamedTuple):
    """Samples `[start, end)` of a track; at most 30 s, the last one mostly shorter (it is padded later)."""

    start: int
    end: int


def plan_windows(num_samples: int, hop_s: float = 25.0) -> list[Window]:
    """Plan the windows of one track.

    A window starts every `hop_s` until one reaches the end of the track: a further one would lie wholly
    inside it. A track of up to 30 s has one window, an empty one none; no window is padding only.

    Args:
        num_samples: Length of the track in samples at 16 kHz.
        hop_s: Distance of window starts in seconds, above 0 and at most 30 (no overlap).

    Raises:
        ValueError: `hop_s` is out of range.
    """
    hop_samples = round(hop_s * SAMPLE_RATE_HZ) if 0 < hop_s <= WINDOW_S else 0
    if hop_samples == 0:
        raise ValueError(f"hop_s must be above 0 and at most {WINDOW_S:g} s, not {hop_s:g}")
    windows: list[Window] = []
    while num_samples > 0 and (not windows or windows[-1].end < num_samples):
        start = len(windows) * hop_samples
        windows.append(Window(start, min(start + WINDOW_SAMPLES, num_samples)))
    return windows
