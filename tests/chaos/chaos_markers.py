"""Bytes that make the decoder child misbehave, for tests only: see `sitecustomize.py` in this folder.

A poisoned file is a valid wav with a foreign RIFF chunk at its end that holds a marker. Every decoder plays it;
only a decoder child started with this folder on PYTHONPATH acts on it.
"""

from __future__ import annotations

import struct

CRASH = b"WEALY-TEST-CRASH"  # a real SIGSEGV
HANG = b"WEALY-TEST-HANG"  # an endless loop in C that ignores SIGTERM
MEMORY = b"WEALY-TEST-MEMORY"  # allocates without bound; ends with a MemoryError
MEMORY_CRASH = b"WEALY-TEST-MEMCRASH"  # the same, but written by somebody who never checks malloc
GARBAGE = b"WEALY-TEST-GARBAGE"  # writes nonsense where frames belong
CHATTER = b"WEALY-TEST-CHATTER"  # prints a megabyte to stdout and to stderr, then decodes as usual

TAIL_BYTES = 64  # the marker stands within the last bytes of the file


def poison(wav: bytes, marker: bytes) -> bytes:
    """Append `marker` to a wav file as a RIFF chunk named `wlyt`."""
    assert wav[:4] == b"RIFF"
    padded = marker + b"\0" * (len(marker) % 2)
    whole = wav + b"\0" * (len(wav) % 2) + b"wlyt" + struct.pack("<I", len(padded)) + padded
    return whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]
