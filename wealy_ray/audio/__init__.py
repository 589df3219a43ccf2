"""Bytes -> 16 kHz mono -> windows -> log-mel.

`mel` needs torch and is imported by its module name; everything here starts fast.
"""

from .decode import Decoded, decode
from .isolate import IsolatedDecoder
from .source import ByteSource, BytesSource
from .windows import SAMPLE_RATE_HZ, WINDOW_SAMPLES, Window, plan_windows

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
