"""Tracks of realistic length for `feed`: sample songs one after the other, encoded anew in each format."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from wealy_ray.audio import SAMPLE_RATE_HZ, BytesSource, decode


@dataclass(frozen=True)
class Format:
    """How a track is encoded; stereo, as music is sold."""

    container: str
    codec: str
    rate_hz: int = 44_100
    bit_rate: int | None = None


FORMATS = {
    "wav": Format("wav", "pcm_s16le"),
    "flac": Format("flac", "flac"),
    "mp3": Format("mp3", "libmp3lame", bit_rate=192_000),
    "ogg": Format("ogg", "vorbis", bit_rate=160_000),
    "opus": Format("ogg", "libopus", rate_hz=48_000, bit_rate=128_000),
    "m4a": Format("ipod", "aac", bit_rate=192_000),
}


@dataclass(frozen=True)
class Track:
    """One encoded track, and what it decodes to."""

    data: bytes
    samples: np.ndarray
    """float32 [n], 16 kHz mono."""

    @property
    def duration_s(self) -> float:
        """Seconds of audio."""
        return len(self.samples) / SAMPLE_RATE_HZ


def make_tracks(songs: list[Path], *, count: int, track_s: float) -> dict[str, list[Track]]:
    """`count` tracks of `track_s` seconds in every format.

    Each track begins with another song; the songs come round again when they do not last.
    """
    parts_CT = {rate_hz: [stereo(song, rate_hz) for song in songs] for rate_hz in (44_100, 48_000)}
    tracks: dict[str, list[Track]] = {}
    for name, format_ in FORMATS.items():
        tracks[name] = []
        for i in range(count):
            first = i * len(songs) // count
            parts = parts_CT[format_.rate_hz]
            audio_CT = np.concatenate(parts[first:] + parts[:first], axis=1)
            num_samples = round(track_s * format_.rate_hz)
            repeats = -(-num_samples // audio_CT.shape[1])
            data = encode(np.tile(audio_CT, repeats)[:, :num_samples], format_)
            samples = decode(BytesSource(data), max_duration_s=track_s + 1).samples
            tracks[name].append(Track(data, samples))
    return tracks


def stereo(path: Path, rate_hz: int) -> np.ndarray:
    """Decode a song to float32 [2, n]."""
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate_hz)
    with av.open(str(path)) as container:
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1)


def encode(audio_CT: np.ndarray, format_: Format) -> bytes:
    """Encode float32 [2, n] as a file of the format."""
    file = io.BytesIO()
    with av.open(file, mode="w", format=format_.container) as container:
        stream = container.add_stream(format_.codec, rate=format_.rate_hz, layout="stereo")
        if format_.bit_rate:
            stream.bit_rate = format_.bit_rate
        stream.options = {"strict": "experimental"}  # PyAV has no other encoder for vorbis than libav's own
        for frame in _frames(audio_CT, format_.rate_hz):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _frames(audio_CT: np.ndarray, rate_hz: int) -> Iterator[av.AudioFrame]:
    """One second each; the encoder cuts them as it likes."""
    for start in range(0, audio_CT.shape[1], rate_hz):
        part_CT = np.ascontiguousarray(audio_CT[:, start : start + rate_hz])
        frame = av.AudioFrame.from_ndarray(part_CT, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate_hz, start
        yield frame
