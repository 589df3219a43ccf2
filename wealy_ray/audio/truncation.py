"""What a file promises to hold, so that a truncated download is noticed.

===================== ======================================= ====================================
container             the promise                             not noticed
===================== ======================================= ====================================
mp3                   bytes and frames of the Xing/Info header a cut of a file without that header
wav                   size of the `data` chunk                streamed wav (placeholder size)
flac, aiff, au, tta,  samples or bytes in the header          streamed flac (count 0)
wavpack, ape
m4a, mp4, mov         sample tables (`moov`)                  fragments missing as a whole
webm, mka, mkv        duration of the segment or track        live recordings (no duration)
ogg (all codecs)      the last page has the end flag          junk of more than 64 KiB at the end
adts, ac3, ts, caf... none: only a damaged last packet tells  a cut between two packets
===================== ======================================= ====================================

An m4a whose `moov` stands at the end and is cut off cannot be decoded at all: `decoder_error`.
"""

from __future__ import annotations

import struct
from typing import Any

from wealy_ray.audio.source import SourceFile

MAX_OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # 65,307
STREAMED_WAV_BYTES = 0x7FFF0000  # data sizes from here on are placeholders of programs that wrote to a pipe

# Demuxers whose stream duration is read from a header (others estimate it from the bit rate), and by how
# many seconds an intact file may be shorter: codec padding, rounded times.
_HEADER_DURATION_S = {
    "flac": 0.01,
    "aiff": 0.01,
    "au": 0.01,
    "tta": 0.01,
    "wv": 0.01,
    "ape": 0.01,
    "mov,mp4,m4a,3gp,3g2,mj2": 0.05,
    "asf": 0.25,
}
_MATROSKA_S = 0.1


def is_truncated(container: Any, stream: Any, file: SourceFile, *, end_s: float, broken_end: bool) -> bool:
    """Return whether a file that was decoded to its end is shorter than it promises to be.

    Args:
        container: Open `av.container.InputContainer`.
        stream: Its audio stream.
        file: The bytes behind it.
        end_s: Where the last good packet ends, in seconds from the start of the stream.
        broken_end: The last packets could not be decoded, or the demuxer gave up.
    """
    name = container.format.name
    if name == "mp3":
        return _mp3_is_cut(file, end_s)  # a broken end is some foreign tag: a cut frame decodes somehow
    if name == "wav":
        return _wav_is_cut(file)
    if name == "ogg":
        return ogg_is_cut(file)
    if name == "matroska,webm":
        declared_s = _matroska_declared_s(container, stream)
        return broken_end if declared_s is None else end_s < declared_s - _MATROSKA_S
    if name in _HEADER_DURATION_S and stream.duration:
        return end_s < float(stream.duration * stream.time_base) - _HEADER_DURATION_S[name]
    return broken_end


def ogg_is_cut(file: SourceFile) -> bool:
    """Return whether an ogg file ends inside a page, or with a page that is not the last of its stream."""
    start = max(0, file.size - 2 * MAX_OGG_PAGE_BYTES)
    tail = file.read_at(start, file.size - start)
    at = tail.rfind(b"OggS\x00")
    if at < 0:
        return False
    header = tail[at : at + 27]
    segments = tail[at + 27 : at + 27 + header[26]] if len(header) == 27 else b""
    if len(header) < 27 or len(segments) < header[26]:
        return True
    is_last = bool(header[5] & 0x04)
    return not is_last or at + 27 + len(segments) + sum(segments) > len(tail)


def _mp3_is_cut(file: SourceFile, end_s: float) -> bool:
    """Hold the Xing/Info header against the file (libavformat drops one that promises far too much)."""
    offset = _id3v2_bytes(file)
    head = file.read_at(offset, 4096)
    sync = next((i for i in range(len(head) - 4) if head[i] == 0xFF and head[i + 1] & 0xE0 == 0xE0), None)
    if sync is None:
        return False
    version, rate_index = head[sync + 1] >> 3 & 3, head[sync + 2] >> 2 & 3
    if version == 1 or rate_index == 3:
        return False
    rate_hz = (44_100, 48_000, 32_000)[rate_index] // {3: 1, 2: 2, 0: 4}[version]  # MPEG 1, 2, 2.5
    frame_samples = 1152 if version == 3 else 576
    frame = head[sync : sync + 64]
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 0 or len(frame) < at + 16 or frame[at + 7] & 3 != 3:
        return False
    num_frames, num_bytes = struct.unpack(">II", frame[at + 8 : at + 16])
    # The encoder's delay and padding, about two frames, are skipped by the decoder.
    declared_s = (num_frames * frame_samples - 2304) / rate_hz
    return end_s < declared_s and offset + sync + num_bytes > file.size


def _id3v2_bytes(file: SourceFile) -> int:
    head = file.read_at(0, 10)
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return 10 + size + (10 if head[5] & 0x10 else 0)


def _wav_is_cut(file: SourceFile) -> bool:
    """Read the size of the `data` chunk, which libavformat silently replaces by what is there."""
    if file.read_at(0, 4) not in (b"RIFF", b"RF64"):
        return False
    offset, ds64_bytes = 12, 0
    for _ in range(64):  # a sane file has fewer chunks before its data
        header = file.read_at(offset, 8)
        if len(header) < 8:
            return False
        kind, size = header[:4], struct.unpack("<I", header[4:])[0]
        if kind == b"ds64":
            (ds64_bytes,) = struct.unpack("<Q", file.read_at(offset + 16, 8).rjust(8, b"\0"))
        elif kind == b"data":
            size = ds64_bytes or (size if size < STREAMED_WAV_BYTES else 0)
            return offset + 8 + size > file.size
        offset += 8 + size + (size & 1)
    return False


def _matroska_declared_s(container: Any, stream: Any) -> float | None:
    """The track's own DURATION tag; else the segment's duration if no other track can be the longer one."""
    tag = stream.metadata.get("DURATION")
    if tag:
        try:
            hours, minutes, seconds = tag.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        except ValueError:
            pass
    alone = all(other is stream or other.type not in ("audio", "video") for other in container.streams)
    return container.duration / 1e6 if alone and container.duration else None
