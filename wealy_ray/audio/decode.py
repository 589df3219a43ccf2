"""Encoded bytes -> 16 kHz mono float32, with libav through PyAV.

The numbers are those of `ffmpeg -i FILE -ac 1 -ar 16000 -f f32le -`: same decoder, same downmix, same
resampler, same treatment of encoder delay, so the same number of samples at the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.stream import Discard

from ..errors import TrackError
from .source import ByteSource, SourceFile
from .truncation import is_truncated
from .windows import SAMPLE_RATE_HZ

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
        Exception: Whatever `source.read` raises, unchanged.
    """
    if source.size == 0:
        raise TrackError("empty_file", "the object has zero bytes")
    file = SourceFile(source)
    try:
        decoded = _decode(file, round(max_duration_s * SAMPLE_RATE_HZ))
    except Exception:
        if file.error is not None:
            raise file.error from None
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
        reader = _Reader(container, stream)
        mixer = _Mixer(max_samples)
        for frame in reader.frames():
            mixer.push(frame)
            if mixer.is_full:
                break
        mixer.flush()
        samples = mixer.samples()
        if container.format.name in _BARE_FORMATS and reader.good_share < _MIN_FRAME_SHARE:
            raise TrackError(
                "not_audio", f"only {reader.good_share:.0%} of the bytes are {stream.name} frames"
            )
        if len(samples) == 0:
            raise reader.failure() or TrackError("zero_duration", "an audio stream without samples")
        if not np.isfinite(samples).all():
            raise TrackError("invalid_samples", "samples are NaN or infinite")
        warnings = []
        if not mixer.is_full:
            broken_end = reader.num_trailing > 0
            if is_truncated(container, stream, file, end_s=reader.end_s, broken_end=broken_end):
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


class _Reader:
    """The decoded frames of one stream, past corrupt packets, and the account of what was lost.

    Attributes:
        num_skipped: Corrupt packets with a good one after them.
        num_trailing: Corrupt packets after the last good one, and a demuxer that gave up.
        decoded_s: Duration of the frames so far, before resampling.
        end_s: Where the last good packet ends, in seconds from the start of the stream.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self._container = container
        self._stream = stream
        self._first_byte: int | None = None
        self._first_s: float | None = None
        # mp4 declares durations from the first sample on, the others from time zero
        self._origin_s = float((stream.start_time or 0) * stream.time_base) if _is_mov(container) else 0.0
        self._end_byte = 0
        self._good_bytes = 0
        self._last_error: Exception | None = None
        self.num_skipped = 0
        self.num_trailing = 0
        self.decoded_s = 0.0
        self.end_s = 0.0
        if stream.codec_context is None:
            raise TrackError("decoder_error", "no decoder for the codec of the audio stream")
        stream.codec_context.thread_count = 1  # one core and one stack per decoder
        try:
            stream.codec_context.open(strict=False)
        except MemoryError:
            raise
        except av.FFmpegError as e:
            raise TrackError("decoder_error", f"the codec cannot be set up: {e.strerror}") from e

    @property
    def good_share(self) -> float:
        """Bytes in decodable packets, as a share of the bytes between the first packet and the last."""
        span = self._end_byte - (self._first_byte or 0)
        return self._good_bytes / span if span > 0 else 0.0

    @property
    def lost_s(self) -> float:
        """Seconds between the first packet and the end of the last that no frame covers."""
        return self.end_s - (self._first_s or 0.0) - self.decoded_s

    def failure(self) -> TrackError | None:
        """The error of a stream of which no packet could be decoded."""
        if self._last_error is None:
            return None
        return TrackError("decoder_error", f"the codec refuses the stream: {self._last_error}")

    def frames(self) -> Iterator[Any]:
        """Yield the frames that can be decoded, as ffmpeg's command line does."""
        for packet in self._packets():
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except av.FFmpegError as e:
                self._last_error = e
                self.num_trailing += 1
                continue
            if packet.size:
                self.num_skipped += self.num_trailing
                self.num_trailing = 0
                self._good_bytes += packet.size
            for frame in frames:
                whole = self._without_padding(frame, packet)
                self.decoded_s += whole.samples / whole.sample_rate
                yield whole
            self._note_times(packet)

    def _note_times(self, packet: Any) -> None:
        if packet.pts is not None and packet.size:
            start_s = float(packet.pts * packet.time_base) - self._origin_s
            self._first_s = start_s if self._first_s is None else self._first_s
            self.end_s = max(self.end_s, start_s + float((packet.duration or 0) * packet.time_base))
        self.end_s = max(self.end_s, self.decoded_s)

    def _without_padding(self, frame: Any, packet: Any) -> Any:
        """Cut the encoder's padding from the last frame of an mp4 (libavformat 62 leaves it, 63 does not)."""
        stream = self._stream
        # Fragmented files do not count their frames beforehand; ffmpeg leaves their padding, too.
        if not _is_mov(self._container) or not (stream.frames and stream.duration) or packet.pts is None:
            return frame
        left_s = ((stream.start_time or 0) + stream.duration - packet.pts) * stream.time_base
        keep = round(left_s * frame.sample_rate)
        if not 0 < keep < frame.samples:
            return frame
        values = frame.to_ndarray()
        width = 1 if frame.format.is_planar else len(frame.layout.channels)
        cut = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(values[:, : keep * width]),
            format=frame.format.name,
            layout=frame.layout.name,
        )
        cut.sample_rate, cut.pts, cut.time_base = frame.sample_rate, frame.pts, frame.time_base
        return cut

    def _packets(self) -> Iterator[Any]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except MemoryError:
                raise
            except av.FFmpegError as e:  # ffmpeg ends the input here, too
                self._last_error = e
                self.num_trailing += 1
                return
            if packet.pos is not None and packet.size:
                self._first_byte = packet.pos if self._first_byte is None else self._first_byte
                self._end_byte = max(self._end_byte, packet.pos + packet.size)
            yield packet


def _is_mov(container: Any) -> bool:
    return "mp4" in container.format.name.split(",")


class _Mixer:
    """libswresample to 16 kHz mono float32; a change of format in mid-stream starts a new resampler.

    Args:
        max_samples: Samples kept; what comes after them is dropped.
    """

    def __init__(self, max_samples: int) -> None:
        self._max_samples = max_samples
        self._num_samples = 0
        self._chunks: list[np.ndarray] = []
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
            self._resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
            self._input = kind
        self._keep(self._resampler.resample(frame))

    def flush(self) -> None:
        """Fetch what the resampler still holds."""
        if self._resampler is not None:
            self._keep(self._resampler.resample(None))
        self._resampler = None
        self._input = None

    def samples(self) -> np.ndarray:
        """Return float32 `[n]`, `n <= max_samples`."""
        if not self._chunks:
            return np.zeros(0, np.float32)
        return np.concatenate(self._chunks)[: self._max_samples]

    def _keep(self, frames: list[Any]) -> None:
        for frame in frames:
            if frame is not None:
                chunk = frame.to_ndarray().reshape(-1).astype(np.float32, copy=False)
                self._chunks.append(chunk)
                self._num_samples += len(chunk)
