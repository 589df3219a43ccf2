"""The layout of the frames between a decoder process and its parent; `child` documents their kinds."""

from __future__ import annotations

import struct

HEADER = struct.Struct("<cI")  # kind, payload length in bytes
RANGE = struct.Struct("<QI")  # offset, length in bytes
