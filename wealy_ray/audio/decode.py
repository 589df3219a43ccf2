"""Encoded bytes -> 16 kHz mono float32, with libav through PyAV.

The numbers are those of `whisper.load_audio`, that is of `ffmpeg -i FILE -ac 1 -ar 16000 -f s16le -`, divided by
32768: same decoder, same downmix, same resampler, same treatment of encoder delay and padding, so the same number
of samples at the same places. Measured: bit-equal to ffmpeg 9.0 on x86-64 for every format, rate, depth and layout
of the tests, for damaged files, too; the tests allow one step of 16 bits (1/32768), for other vector units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.stream import Discard

from wealy_ray.audio.mixer import Mixer
from wealy_ray.audio.reader import StreamReader
from wealy_ray.audio.source import ByteSource, SourceFile
from wealy_ray.audio.truncation import is_truncated
from wealy_ray.audio.windows import SAMPLE_RATE_HZ
from wealy_ray.errors import TrackError

# What libavformat may take a file for. Playlists and scripts (hls, concat, ...) would open other files;
# images, subtitles and game formats claim text and noise.
FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,eac3,flac,flv,loas,matroska,webm,mov,mp4,mp3,mpc,mpc8,mpeg,mpegts,"
    "ogg,oma,rm,tak,tta,voc,w64,wav,wv,xwma"
)

# Bare frames without a container: any bytes hold some that look like frames.
_BARE_FORMATS = {"aac", "ac3", "amr", "dts", "eac3", "loas", "mp3"}
_MIN_FRAME_SHARE = 0.5

# Containers with exact times, where a hole between the packets is seen (lost ogg pages leave no other trace).
_TIMED_FORMATS = {"flac", "matroska,webm", "ogg"}
_LOST_S = 0.05

_MAGICS = {  # a known container whose header cannot be read: damaged audio, not another kind of file
    "mp4": (4, b"ftyp"),
    "ogg": (0, b"OggS"),
    "flac": (0, b"fLaC"),
    "matroska": (0, b"\x1a\x45\xdf\xa3"),
    "wav": (8, b"WAVE"),
    "aiff": (8, b"AIF"),
}


@dataclass(frozen=True)
class Decoded:
    """One decoded track.

    Args:
        samples: float32 `[n]`, 16 kHz mono; not limited to [-1, 1].
        duration_s: `n / 16000`.
        warnings: Sentences about what is missing, e.g. `"truncated after 41.2 s"`.
    """

    samples: np.ndarray
    duration_s: float
    warnings: tuple[str, ...]


def decode(source: ByteSource, *, max_duration_s: float) -> Decoded:
    """Decode the first audio stream of `source` in this process.

    Broken files can crash, hang or exhaust the process: `isolate.IsolatedDecoder` is the safe way in.

    Args:
        source: The encoded bytes; only what is needed is read, in blocks of 1 MiB.
        max_duration_s: Decoding stops here. A longer track is cut without a warning: the cut is a setting.

    Returns:
        The samples. Corrupt packets are skipped as ffmpeg does, with the warning "N corrupt packets
        skipped"; a file that ends too early gives what is there, with "truncated after X s" (what can be
        noticed: see `truncation`).

    Raises:
        TrackError: `empty_file`, `not_audio`, `no_audio_stream`, `zero_duration`, `invalid_samples` or
            `decoder_error`.
        MemoryError: The codec asked for more than there is.
        Exception: Whatever `source.read` raises, unchanged.
    """
    if source.size == 0:
        raise TrackError("empty_file", "the object has zero bytes")
    file = SourceFile(source)
    try:
        decoded = _decode(file, round(max_duration_s * SAMPLE_RATE_HZ))
    except Exception as e:
        if file.error is not None:
            raise file.error from None
        if isinstance(e, (av.FFmpegError, ValueError)) and not isinstance(e, MemoryError):
            raise TrackError("decoder_error", f"the codec refuses the stream: {e}") from e
        raise
    if file.error is not None:
        raise file.error
    return decoded


def _decode(file: SourceFile, max_samples: int) -> Decoded:
    with _open(file) as container:
        if not container.streams.audio:
            raise TrackError("no_audio_stream", f"a {container.format.name} file without an audio stream")
        stream = container.streams.audio[0]
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all  # a film's pictures are neither read nor parsed
        reader = StreamReader(container, stream)
        mixer = Mixer(max_samples)
        for frame in reader.frames():
            mixer.push(frame)
            if mixer.is_full:
                break
        mixer.flush()
        samples = mixer.samples()
        is_short = not mixer.is_full and is_truncated(
            container, stream, file, end_s=reader.end_s, broken_end=reader.num_trailing > 0
        )
        if container.format.name in _BARE_FORMATS and reader.good_share < _MIN_FRAME_SHARE:
            raise TrackError(
                "not_audio", f"only {reader.good_share:.0%} of the bytes are {stream.name} frames"
            )
        if len(samples) == 0:
            raise reader.failure() or _emptiness(is_short)
        if mixer.has_invalid:
            raise TrackError("invalid_samples", "samples are NaN or infinite")
        warnings = []
        if is_short:
            warnings.append(f"truncated after {len(samples) / SAMPLE_RATE_HZ:.1f} s")
        if reader.num_skipped:
            warnings.append(f"{reader.num_skipped} corrupt packets skipped")
        if container.format.name in _TIMED_FORMATS and reader.lost_s > _LOST_S:
            warnings.append(f"{reader.lost_s:.1f} s missing inside the file")
    return Decoded(samples, len(samples) / SAMPLE_RATE_HZ, tuple(warnings))


def _open(file: SourceFile) -> Any:
    """Open the container, or say what the bytes are instead."""
    try:
        return av.open(
            file,
            mode="r",
            options={"format_whitelist": FORMATS, "protocol_whitelist": "none"},
            metadata_errors="replace",  # tags are Latin-1 as often as not
        )
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as e:
        if file.error is not None:
            raise
        head = file.read_at(0, 16)
        for name, (at, magic) in _MAGICS.items():
            if head[at : at + len(magic)] == magic:
                raise TrackError("decoder_error", f"the {name} header is damaged or cut off") from e
        raise TrackError("not_audio", "the bytes are no audio or video container") from e


def _emptiness(is_short: bool) -> TrackError:
    if is_short:
        return TrackError("decoder_error", "the header promises samples, but there are none")
    return TrackError("zero_duration", "an audio stream without samples")
