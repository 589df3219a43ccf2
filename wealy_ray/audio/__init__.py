"""Bytes -> 16 kHz mono -> windows -> log-mel.

`mel` needs torch and is imported by its module name; everything here starts fast.
"""

from wealy_ray.audio.decode import Decoded, decode
from wealy_ray.audio.isolate import IsolatedDecoder
from wealy_ray.audio.source import ByteSource, BytesSource
from wealy_ray.audio.windows import SAMPLE_RATE_HZ, WINDOW_SAMPLES, Window, plan_windows

__all__ = [
    "SAMPLE_RATE_HZ",
    "WINDOW_SAMPLES",
    "ByteSource",
    "BytesSource",
    "Decoded",
    "IsolatedDecoder",
    "Window",
    "decode",
    "plan_windows",
]
