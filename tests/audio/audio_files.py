"""Encoded test files, made with ffmpeg's command line, and what that command line decodes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SONGS = sorted((Path(__file__).parents[2] / "examples" / "songs" / "audio").glob("s2t*"))
DURATION_S = 3.0

# name: (sample rate, channels or layout, encoder arguments)
ZOO: dict[str, tuple[int, int | str, str]] = {
    "8k.mp3": (8000, 1, "-c:a libmp3lame -b:a 32k"),
    "11k.mp3": (11025, 2, "-c:a libmp3lame -b:a 48k"),
    "16k.mp3": (16000, 1, "-c:a libmp3lame -b:a 48k"),
    "22k.mp3": (22050, 2, "-c:a libmp3lame -b:a 64k"),
    "44k.mp3": (44100, 2, "-c:a libmp3lame -b:a 128k"),
    "48k.mp3": (48000, 2, "-c:a libmp3lame -b:a 128k"),
    "vbr.mp3": (44100, 1, "-c:a libmp3lame -q:a 4"),
    "noxing.mp3": (44100, 2, "-c:a libmp3lame -b:a 96k -write_xing 0"),
    "44k.m4a": (44100, 2, "-c:a aac -b:a 96k"),
    "22k.m4a": (22050, 1, "-c:a aac -b:a 48k -movflags +faststart"),
    "fragmented.m4a": (44100, 2, "-c:a aac -b:a 96k -movflags frag_keyframe+empty_moov -f mp4"),
    "surround.m4a": (48000, "5.1", "-c:a aac -b:a 256k"),
    "alac.m4a": (96000, 2, "-c:a alac"),
    "adts.aac": (44100, 2, "-c:a aac -b:a 96k"),
    "vorbis.ogg": (44100, 2, "-c:a libvorbis -q:a 3"),
    "surround.ogg": (48000, "5.1", "-c:a libvorbis -q:a 3"),
    "opus.opus": (48000, 2, "-c:a libopus -b:a 64k"),
    "opus.webm": (48000, 2, "-c:a libopus -b:a 64k"),
    "vorbis.webm": (44100, 1, "-c:a libvorbis"),
    "16bit.flac": (44100, 2, "-c:a flac -sample_fmt s16"),
    "24bit.flac": (192000, 2, "-c:a flac -sample_fmt s32"),
    "surround.flac": (48000, "5.1", "-c:a flac"),
    "u8.wav": (44100, 2, "-c:a pcm_u8"),
    "s16.wav": (44100, 2, "-c:a pcm_s16le"),
    "s24.wav": (44100, 2, "-c:a pcm_s24le"),
    "s32.wav": (44100, 2, "-c:a pcm_s32le"),
    "f32.wav": (44100, 2, "-c:a pcm_f32le"),
    "f64.wav": (44100, 2, "-c:a pcm_f64le"),
    "8k.wav": (8000, 1, "-c:a pcm_s16le"),
    "16k.wav": (16000, 1, "-c:a pcm_s16le"),
    "96k.wav": (96000, 1, "-c:a pcm_s16le"),
    "192k.wav": (192000, 1, "-c:a pcm_s16le"),
    "quad.wav": (48000, "quad", "-c:a pcm_s16le"),
    "surround.wav": (48000, "5.1", "-c:a pcm_s16le"),
    "wavpack.wv": (44100, 2, "-c:a wavpack"),
    "pcm.aiff": (44100, 2, ""),
    "aac.ts": (44100, 2, "-c:a aac -f mpegts"),
}


def signal_CT(rate_hz: int, num_channels: int, duration_s: float) -> np.ndarray:  # noqa: N802
    """Another sweep in every channel, over a little noise: float32 `[T, C]`."""
    t = np.arange(int(rate_hz * duration_s)) / rate_hz
    noise = 0.05 * np.random.default_rng(0).standard_normal((num_channels, len(t)))
    sweeps = [0.3 * np.sin(2 * np.pi * (220 + 110 * c) * t * (1 + 0.05 * t)) for c in range(num_channels)]
    return np.ascontiguousarray((noise + sweeps).T, dtype=np.float32)


def encode(
    path: Path, rate_hz: int, channels: int | str, arguments: str, duration_s: float = DURATION_S
) -> Path:
    """Encode the test signal."""
    num_channels = {"5.1": 6, "quad": 4}[channels] if isinstance(channels, str) else channels
    layout = ["-channel_layout", channels] if isinstance(channels, str) else ["-ac", str(channels)]
    data = signal_CT(rate_hz, num_channels, duration_s).tobytes()
    ffmpeg("-f", "f32le", "-ar", str(rate_hz), *layout, "-i", "-", *arguments.split(), str(path), data=data)
    return path


def make(folder: Path, name: str, duration_s: float = DURATION_S) -> bytes:
    """Encode one file of the zoo."""
    rate_hz, channels, arguments = ZOO[name]
    return encode(folder / name, rate_hz, channels, arguments, duration_s).read_bytes()


def ffmpeg(*arguments: str, data: bytes = b"") -> bytes:
    """Run ffmpeg and return its stdout."""
    command = [FFMPEG, "-v", "error", "-y", *arguments]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-800:]
    return done.stdout


def ffmpeg_samples(path: Path) -> np.ndarray:
    """What the command line decodes to 16 kHz mono float32, errors in the file or not."""
    command = [FFMPEG, "-v", "quiet", "-i", str(path), "-ac", "1", "-ar", "16000", "-f", "s16le", "-"]
    return (
        np.frombuffer(subprocess.run(command, capture_output=True, check=False).stdout, "<i2").astype(
            np.float32
        )
        / 32768
    )
