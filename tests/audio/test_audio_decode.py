import gzip
import io
import os
import struct
import time
from pathlib import Path

import av
import numpy as np
import pytest
from audio_files import DURATION_S, SONGS, ZOO, encode, ffmpeg, ffmpeg_samples, make

from wealy_ray.audio import BytesSource, decode
from wealy_ray.errors import TrackError

ATOL = 1 / 32768  # bit-equal with every build tried; this much is left to other vector instructions


def decode_bytes(data: bytes, max_duration_s: float = 300.0):
    return decode(BytesSource(data), max_duration_s=max_duration_s)


def assert_like_ffmpeg(path: Path, max_duration_s: float = 300.0) -> tuple[str, ...]:
    decoded = decode_bytes(path.read_bytes(), max_duration_s)
    expected = ffmpeg_samples(path)[: round(max_duration_s * 16_000)]
    assert decoded.samples.dtype == np.float32
    assert decoded.samples.shape == expected.shape
    np.testing.assert_allclose(decoded.samples, expected, rtol=0, atol=ATOL)
    assert decoded.duration_s == len(expected) / 16_000
    return decoded.warnings


def wav(samples: np.ndarray, rate_hz: int = 16_000) -> bytes:
    """A mono float32 wav, written by hand: ffmpeg would not write NaN."""
    data = samples.astype("<f4").tobytes()
    fmt = struct.pack("<HHIIHH", 3, 1, rate_hz, rate_hz * 4, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


class CountingSource(BytesSource):
    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.num_bytes = 0

    def read(self, offset: int, length: int) -> bytes:
        self.num_bytes += length
        return super().read(offset, length)


class EndlessSource:
    """A head and a block that is repeated: hours of audio that exist nowhere."""

    def __init__(self, head: bytes, block: bytes, num_blocks: int) -> None:
        self.size = len(head) + len(block) * num_blocks
        self.num_bytes = 0
        self._head, self._block = head, block

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        self.num_bytes += length
        start = offset - len(self._head)
        if start < 0:
            return (self._head + self._block * (length // len(self._block) + 1))[offset : offset + length]
        first = start // len(self._block)
        skip = start - first * len(self._block)
        return (self._block * (length // len(self._block) + 2))[skip : skip + length]


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", ZOO)
def test_every_format_agrees_with_ffmpeg(tmp_path, name):
    make(tmp_path, name)
    assert assert_like_ffmpeg(tmp_path / name) == ()


@pytest.mark.parametrize("path", SONGS, ids=lambda path: path.name)
def test_songs_agree_with_ffmpeg(path):
    assert assert_like_ffmpeg(path) == ()


def test_cover_art_is_ignored(tmp_path):
    cover = tmp_path / "cover.png"
    ffmpeg("-f", "lavfi", "-i", "color=red:s=64x64", "-frames:v", "1", str(cover))
    for name in ("44k.mp3", "44k.m4a"):
        make(tmp_path, name)
        path = tmp_path / f"cover_{name}"
        maps = ["-map", "0:a", "-map", "1:v", "-c", "copy", "-disposition:v", "attached_pic"]
        ffmpeg("-i", str(tmp_path / name), "-i", str(cover), *maps, str(path))
        assert assert_like_ffmpeg(path) == ()


def test_the_sound_of_a_film_is_decoded(tmp_path):
    path = tmp_path / "film.mp4"
    sources = ["-f", "lavfi", "-i", "testsrc=s=320x240:d=3", "-f", "lavfi", "-i", "sine=d=3"]
    ffmpeg(*sources, "-c:v", "mpeg4", "-c:a", "aac", str(path))
    assert assert_like_ffmpeg(path) == ()


def test_a_change_of_format_in_mid_stream(tmp_path):
    first, second = make(tmp_path, "44k.mp3"), make(tmp_path, "22k.mp3")
    decoded = decode_bytes(first + second)
    assert decoded.duration_s == pytest.approx(2 * DURATION_S, abs=0.2)
    start = decode_bytes(first).samples
    np.testing.assert_array_equal(decoded.samples[: len(start) - 800], start[:-800])


def test_silence_is_no_fault():
    decoded = decode_bytes(wav(np.zeros(32_000)))
    assert decoded.samples.shape == (32_000,)
    assert not decoded.samples.any()
    assert decoded.warnings == ()


# -------------------------------------------------------------------------------------------------------------- cut


def test_ten_hours_of_wav_cost_a_minute():
    num_samples = 10 * 3600 * 44_100
    head = wav(np.zeros(0), 44_100)
    head = head[:-4] + struct.pack("<I", min(num_samples * 4, 2**32 - 1))
    block = (0.1 * np.random.default_rng(0).standard_normal(44_100)).astype("<f4").tobytes()
    source = EndlessSource(head, block, 10 * 3600)
    started_s = time.monotonic()
    decoded = decode(source, max_duration_s=60.0)
    assert time.monotonic() - started_s < 10.0
    assert decoded.samples.shape == (960_000,)
    assert decoded.warnings == ()
    assert source.size > 6e9
    assert source.num_bytes < 60 * 44_100 * 4 + (3 << 20)


def test_ten_hours_of_mp3_cost_a_minute(tmp_path):
    block = make(tmp_path, "noxing.mp3")
    source = EndlessSource(b"", block, int(10 * 3600 / DURATION_S))
    decoded = decode(source, max_duration_s=60.0)
    assert decoded.samples.shape == (960_000,)
    assert source.size > 4e8
    assert source.num_bytes < 4 << 20


@pytest.mark.parametrize("name", ["44k.m4a", "fragmented.m4a", "opus.opus", "opus.webm", "16bit.flac"])
def test_a_long_file_is_read_only_as_far_as_the_cut(tmp_path, name):
    make(tmp_path, name, 20.0)
    path = tmp_path / f"long_{name}"
    extra = ZOO[name][2].split("-movflags")[1:]
    flags = ["-movflags", *extra[0].split()] if extra else []
    ffmpeg("-stream_loop", "100", "-i", str(tmp_path / name), "-c", "copy", *flags, str(path))
    source = CountingSource(path.read_bytes())
    decoded = decode(source, max_duration_s=30.0)
    assert decoded.samples.shape == (480_000,)
    assert decoded.warnings == ()
    assert source.size > 12e6
    assert source.num_bytes < 6e6


def test_the_cut_is_a_prefix(tmp_path):
    for name in ("44k.mp3", "44k.m4a", "vorbis.ogg", "24bit.flac"):
        make(tmp_path, name)
        assert assert_like_ffmpeg(tmp_path / name, max_duration_s=1.2345) == ()


# ----------------------------------------------------------------------------------------------------------- faults

TEXT = "La strada e lunga, la notte bianca.\n" * 3000
NOT_AUDIO = {
    "text": TEXT.encode(),
    "utf16": TEXT.encode("utf-16"),
    "text behind an ID3 tag": b"ID3\x03" + bytes(6) + TEXT.encode(),
    "html": b"<!DOCTYPE html><html><body>" + b"<p>404 not found</p>" * 2000,
    "json": b'{"error": "x"}',
    "lyrics": b"[ar:x]\n" + b"[00:12.00]Line 1\n[00:17.20]Line 2\n" * 20,
    "subtitles": b"1\n00:00:01,000 --> 00:00:02,000\nhi\n\n" * 50,
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n",
    "zeros": bytes(100_000),
    "ones": b"\xff" * 100_000,
    "mp3 headers only": b"\xff\xfb\x90\x00" * 50_000,
    "noise": np.random.default_rng(0).bytes(300_000),
    "gzip": gzip.compress(np.random.default_rng(1).bytes(200_000)),
    "a byte": b"a",
    "a program": Path("/bin/bash").read_bytes() if Path("/bin/bash").exists() else b"\x7fELF" * 1000,
}


def fault_of(data: bytes) -> TrackError:
    with pytest.raises(TrackError) as caught:
        decode_bytes(data)
    return caught.value


@pytest.mark.parametrize("kind", NOT_AUDIO)
def test_not_audio(kind):
    assert fault_of(NOT_AUDIO[kind]).error_type == "not_audio"


def test_a_script_cannot_open_other_files(tmp_path):
    make(tmp_path, "s16.wav")
    script = f"ffconcat version 1.0\nfile '{tmp_path / 's16.wav'}'\n"
    assert fault_of(script.encode()).error_type == "not_audio"


def test_empty_file():
    assert fault_of(b"").error_type == "empty_file"


def test_no_audio_stream(tmp_path):
    path = tmp_path / "silent.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:d=1", "-c:v", "mpeg4", str(path))
    assert fault_of(path.read_bytes()).error_type == "no_audio_stream"


def test_zero_duration():
    assert fault_of(wav(np.zeros(0))).error_type == "zero_duration"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_invalid_samples(value):
    samples = np.zeros(44_100)
    samples[1000] = value
    assert fault_of(wav(samples, 44_100)).error_type == "invalid_samples"


def test_an_invalid_sample_behind_the_cut_does_not_matter():
    samples = np.zeros(320_000)
    samples[-1] = np.nan
    assert decode_bytes(wav(samples), max_duration_s=5.0).duration_s == 5.0


def test_decoder_error(tmp_path):
    m4a = make(tmp_path, "44k.m4a")
    assert fault_of(m4a[: len(m4a) // 2]).error_type == "decoder_error"  # the index stood at the end
    flac = bytearray(make(tmp_path, "16bit.flac"))
    flac[100:] = bytes(len(flac) - 100)
    assert fault_of(bytes(flac)).error_type == "decoder_error"
    assert fault_of(make(tmp_path, "s16.wav")[:30]).error_type == "decoder_error"


def test_tags_in_latin_1_do_no_harm(tmp_path):
    path = encode(tmp_path / "bare.mp3", 44_100, 1, "-c:a libmp3lame -b:a 64k -id3v2_version 0")
    mp3 = path.read_bytes()
    tagged = mp3 + b"TAG" + "Perch\u00e9 no".encode("latin-1").ljust(125, b"\0")
    with pytest.raises(UnicodeDecodeError):  # what PyAV makes of it when left alone
        av.open(io.BytesIO(tagged))
    np.testing.assert_array_equal(decode_bytes(tagged).samples, decode_bytes(mp3).samples)


# ------------------------------------------------------------------------------------------------- truncated, damaged

TRUNCATED = [
    "44k.mp3",
    "vbr.mp3",
    "22k.m4a",
    "fragmented.m4a",
    "adts.aac",
    "vorbis.ogg",
    "opus.opus",
    "opus.webm",
    "vorbis.webm",
    "16bit.flac",
    "24bit.flac",
    "s16.wav",
    "f32.wav",
    "surround.wav",
    "wavpack.wv",
    "pcm.aiff",
]


@pytest.mark.parametrize("share", [0.6, 0.95])
@pytest.mark.parametrize("name", TRUNCATED)
def test_a_truncated_file_gives_what_is_there(tmp_path, name, share):
    data = make(tmp_path, name)
    path = tmp_path / f"cut_{name}"
    path.write_bytes(data[: int(len(data) * share) + 13])
    decoded_s = len(ffmpeg_samples(path)) / 16_000
    assert 0.3 * DURATION_S < decoded_s < DURATION_S
    assert assert_like_ffmpeg(path) == (f"truncated after {decoded_s:.1f} s",)


def test_a_cut_file_that_was_truncated_further_on_needs_no_warning(tmp_path):
    data = make(tmp_path, "s16.wav")
    assert decode_bytes(data[: len(data) * 2 // 3], max_duration_s=1.0).warnings == ()


@pytest.mark.parametrize("name", ["s16.wav", "16bit.flac", "opus.webm", "44k.mp3", "adts.aac"])
def test_a_streamed_file_without_a_length_is_not_called_truncated(tmp_path, name):
    suffix = {"mp3": "mp3", "aac": "adts"}.get(name.split(".")[1], name.split(".")[1])
    make(tmp_path, name)
    streamed = ffmpeg("-i", str(tmp_path / name), "-f", suffix, "-")
    assert decode_bytes(streamed).warnings == ()


def test_foreign_tags_behind_an_mp3_are_no_truncation(tmp_path):
    mp3 = make(tmp_path, "noxing.mp3")
    ape = b"APETAGEX" + struct.pack("<IIIIQ", 2000, 32, 0, 0x80000000, 0)
    for tag in (b"TAG" + bytes(125), ape, b"LYRICSBEGIN" + b"la la " * 800 + b"004811LYRICS200", bytes(5000)):
        decoded = decode_bytes(mp3 + tag)
        assert decoded.warnings == ()
        assert decoded.duration_s == decode_bytes(mp3).duration_s


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("44k.mp3", "corrupt packets skipped"),
        ("adts.aac", "corrupt packets skipped"),
        ("22k.m4a", "corrupt packets skipped"),
        ("16bit.flac", "s missing inside the file"),
        ("vorbis.ogg", "s missing inside the file"),
        ("opus.opus", "s missing inside the file"),
        ("opus.webm", "s missing inside the file"),
    ],
)
def test_damage_in_the_middle_is_passed_as_ffmpeg_does(tmp_path, name, warning):
    data = bytearray(make(tmp_path, name, 12.0))
    middle, length = len(data) // 2, 3000 if name == "44k.mp3" else 600
    data[middle : middle + length] = b"abcdef" * (length // 6)
    path = tmp_path / f"bad_{name}"
    path.write_bytes(data)
    (said,) = assert_like_ffmpeg(path)
    assert warning in said


# ----------------------------------------------------------------------------------------------------------- source


class BrokenSource(BytesSource):
    def __init__(self, data: bytes, num_good: int, error: Exception | None) -> None:
        super().__init__(data)
        self._num_good, self._error = num_good, error

    def read(self, offset: int, length: int) -> bytes:
        self._num_good -= 1
        if self._num_good >= 0:
            return super().read(offset, length)
        if self._error is not None:
            raise self._error
        return super().read(offset, length // 2)


@pytest.mark.parametrize("name", ["24bit.flac", "192k.wav", "alac.m4a"])
@pytest.mark.parametrize("num_good", [0, 1, 2])
def test_an_error_of_the_source_comes_through_unchanged(tmp_path, name, num_good):
    rate_hz, channels, arguments = ZOO[name]
    data = encode(tmp_path / name, rate_hz, channels, arguments, 12.0).read_bytes()
    assert len(data) > 4 << 20
    error = ConnectionResetError("the bucket has gone")
    with pytest.raises(ConnectionResetError) as caught:
        decode(BrokenSource(data, num_good, error), max_duration_s=300.0)
    assert caught.value is error


def test_a_short_read_is_an_error_not_a_truncated_track(tmp_path):
    with pytest.raises(OSError, match="asked for"):
        decode(BrokenSource(make(tmp_path, "192k.wav", 12.0), 2, None), max_duration_s=300.0)


def test_decoding_leaves_no_file_open(tmp_path):
    data = make(tmp_path, "44k.m4a")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        decode_bytes(data)
        fault_of(data[:1000])
    assert len(os.listdir("/proc/self/fd")) == before
