"""One audio stream: its packets and frames, past what is corrupt, as ffmpeg's command line reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import numpy as np

from wealy_ray.errors import TrackError


class StreamReader:
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
