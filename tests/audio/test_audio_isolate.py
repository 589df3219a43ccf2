import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from audio_files import SONGS, ffmpeg, make

from wealy_ray.audio import BytesSource, IsolatedDecoder, decode
from wealy_ray.errors import TrackError

CHAOS = Path(__file__).parents[1] / "chaos"
sys.path.append(str(CHAOS))

import chaos_markers as chaos  # noqa: E402

MEMORY_BYTES = 128 << 20


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> bytes:
    return make(tmp_path_factory.mktemp("wav"), "s16.wav")


@pytest.fixture
def decoder(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHAOS))
    with IsolatedDecoder(300.0, 20.0, MEMORY_BYTES) as decoder:
        yield decoder


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "wealy_ray.audio.child" in child.cmdline()]


def fault_of(decoder: IsolatedDecoder, data: bytes) -> TrackError:
    with pytest.raises(TrackError) as caught:
        decoder.decode(BytesSource(data))
    return caught.value


def assert_works(decoder: IsolatedDecoder, wav: bytes) -> None:
    np.testing.assert_array_equal(
        decoder.decode(BytesSource(wav)).samples, decode(BytesSource(wav), max_duration_s=300.0).samples
    )


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie that nobody here can reap counts."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# ---------------------------------------------------------------------------------------------------- good behaviour


def test_the_same_bits_as_in_process_from_one_child(decoder):
    pids = set()
    for path in SONGS[:6]:
        isolated = decoder.decode(BytesSource(path.read_bytes()))
        here = decode(BytesSource(path.read_bytes()), max_duration_s=300.0)
        np.testing.assert_array_equal(isolated.samples, here.samples)
        assert isolated.samples.dtype == np.float32
        assert isolated.samples.flags.writeable
        assert (isolated.duration_s, isolated.warnings) == (here.duration_s, here.warnings)
        pids |= {child.pid for child in children()}
    assert len(pids) == 1


def test_warnings_and_faults_come_through_and_keep_the_child(decoder, wav):
    assert decoder.decode(BytesSource(wav[: len(wav) // 2])).warnings == ("truncated after 1.5 s",)
    (child,) = children()
    for data, error_type in (
        (b"", "empty_file"),
        (b"no music" * 99, "not_audio"),
        (wav[:30], "decoder_error"),
    ):
        assert fault_of(decoder, data).error_type == error_type
    assert_works(decoder, wav)
    assert children() == [child]


def test_the_cut_and_only_its_bytes(wav):
    class Counting(BytesSource):
        num_bytes = 0

        def read(self, offset: int, length: int) -> bytes:
            self.num_bytes += length
            return super().read(offset, length)

    source = Counting(wav[:44] + wav[44:] * 40)
    with IsolatedDecoder(2.0, 20.0, MEMORY_BYTES) as decoder:
        assert decoder.decode(source).duration_s == 2.0
    assert source.num_bytes < source.size / 4


def test_the_child_is_light_and_limited(decoder, wav):
    assert_works(decoder, wav)
    (child,) = children()
    maps = Path(f"/proc/{child.pid}/maps").read_text()
    assert "libavcodec" in maps
    assert "torch" not in maps
    limits = dict.fromkeys(Path(f"/proc/{child.pid}/limits").read_text().splitlines())
    (address_space,) = (line.split()[3] for line in limits if line.startswith("Max address space"))
    assert MEMORY_BYTES < int(address_space) < MEMORY_BYTES + (600 << 20)
    assert os.getpgid(child.pid) == child.pid
    assert child.num_threads() == 1


def test_recycling(wav):
    with IsolatedDecoder(300.0, 20.0, MEMORY_BYTES, recycle_after=2) as decoder:
        pids = []
        for _ in range(5):
            assert_works(decoder, wav)
            (child,) = children()
            pids.append(child.pid)
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
    assert children() == []


def test_the_least_memory_is_enough_for_five_minutes_and_less_is_refused(tmp_path):
    with pytest.raises(ValueError, match="memory_bytes must be at least") as caught:
        IsolatedDecoder(300.0, 20.0, 1 << 20)
    least_bytes = int(str(caught.value).split()[5])
    with IsolatedDecoder(300.0, 60.0, least_bytes) as decoder:
        for name in ("44k.mp3", "44k.m4a", "192k.wav"):
            make(tmp_path, name)
            path = tmp_path / f"long_{name}"
            ffmpeg("-stream_loop", "101", "-i", str(tmp_path / name), "-c", "copy", str(path))
            for _ in range(2):
                assert decoder.decode(BytesSource(path.read_bytes())).duration_s == 300.0


# ------------------------------------------------------------------------------------------------------ misbehaviour


def test_a_crash(decoder, wav):
    fault = fault_of(decoder, chaos.poison(wav, chaos.CRASH))
    assert fault.error_type == "decoder_crashed"
    assert "signal SIGSEGV" in str(fault)
    assert children() == []
    assert_works(decoder, wav)


def test_a_hang_that_ignores_sigterm(monkeypatch, wav):
    monkeypatch.setenv("PYTHONPATH", str(CHAOS))
    with IsolatedDecoder(300.0, 1.0, MEMORY_BYTES) as decoder:
        assert_works(decoder, wav)
        started_s = time.monotonic()
        fault = fault_of(decoder, chaos.poison(wav, chaos.HANG))
        assert time.monotonic() - started_s < 4.0
        assert fault.error_type == "decoder_timeout"
        assert children() == []
        assert_works(decoder, wav)


@pytest.mark.parametrize("marker", [chaos.MEMORY, chaos.MEMORY_CRASH], ids=["MemoryError", "death"])
def test_allocation_without_bound(decoder, wav, marker):
    assert fault_of(decoder, chaos.poison(wav, marker)).error_type == "decoder_out_of_memory"
    assert children() == []
    assert_works(decoder, wav)


def test_garbage_instead_of_frames(decoder, wav):
    assert fault_of(decoder, chaos.poison(wav, chaos.GARBAGE)).error_type == "decoder_crashed"
    assert children() == []
    assert_works(decoder, wav)


def test_chatter_on_stdout_and_stderr_is_harmless(decoder, wav):
    for _ in range(2):
        assert_works(decoder, wav)
        assert decoder.decode(BytesSource(chaos.poison(wav, chaos.CHATTER))).warnings == ()


def test_markers_do_nothing_outside_the_child(wav):
    poisoned = decode(BytesSource(chaos.poison(wav, chaos.CRASH)), max_duration_s=300.0)
    clean = decode(BytesSource(wav), max_duration_s=300.0)
    np.testing.assert_array_equal(poisoned.samples, clean.samples)


def test_misbehaviour_leaks_no_descriptors_and_no_zombies(decoder, wav):
    assert_works(decoder, wav)
    decoder.close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        fault_of(decoder, chaos.poison(wav, chaos.CRASH))
        assert_works(decoder, wav)
        decoder.close()
        decoder.close()  # twice is fine
    assert len(os.listdir("/proc/self/fd")) == before
    assert psutil.Process().children() == [] or all(
        child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process().children()
    )


# ------------------------------------------------------------------------------------------- the world around the child


class CallbackSource(BytesSource):
    """Calls back before every read."""

    def __init__(self, data: bytes, callback) -> None:
        super().__init__(data)
        self._callback = callback

    def read(self, offset: int, length: int) -> bytes:
        self._callback()
        return super().read(offset, length)


def test_an_error_of_the_source_comes_through_unchanged(decoder, wav):
    error = ConnectionResetError("the bucket has gone")

    def fail() -> None:
        raise error

    with pytest.raises(ConnectionResetError) as caught:
        decoder.decode(CallbackSource(wav, fail))
    assert caught.value is error
    assert children() == []
    assert_works(decoder, wav)


def test_a_short_read_is_an_error_not_a_truncated_track(decoder, wav):
    source = BytesSource(wav)
    source.size += 1000
    with pytest.raises(OSError, match="asked for"):
        decoder.decode(source)


def test_time_in_the_source_does_not_count(wav):
    with IsolatedDecoder(300.0, 0.5, MEMORY_BYTES) as decoder:
        assert_works(decoder, wav)
        assert decoder.decode(CallbackSource(wav, lambda: time.sleep(1.0))).duration_s > 0


def test_a_kill_from_outside_is_not_the_track_s_fault(decoder, wav):
    kills = []

    def kill_once() -> None:
        if not kills:
            kills.append(children()[0].kill())

    decoder.decode(CallbackSource(wav, kill_once))
    assert kills
    children()[0].kill()  # between two tracks
    assert_works(decoder, wav)


def test_a_track_that_is_killed_every_time_is_given_up(decoder, wav):
    with pytest.raises(TrackError, match="signal SIGKILL") as caught:
        decoder.decode(CallbackSource(wav, lambda: [child.kill() for child in children()]))
    assert caught.value.error_type == "decoder_crashed"


def test_a_child_that_cannot_start_is_no_fault_of_the_track(monkeypatch, tmp_path, wav):
    (tmp_path / "av.py").write_text("raise ImportError('no codec library for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        IsolatedDecoder(300.0, 20.0, MEMORY_BYTES) as decoder,
        pytest.raises(RuntimeError, match="cannot be started") as caught,
    ):
        decoder.decode(BytesSource(wav))
    assert "no codec library for this machine" in str(caught.value)
    assert children() == []


def test_the_child_dies_with_its_parent(tmp_path, wav):
    (tmp_path / "hang.wav").write_bytes(chaos.poison(wav, chaos.HANG))
    program = (
        "import sys; from wealy_ray.audio import BytesSource, IsolatedDecoder\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        f"IsolatedDecoder(300.0, 600.0, {MEMORY_BYTES}).decode(BytesSource(data))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "hang.wav")],
        env={**os.environ, "PYTHONPATH": str(CHAOS)},
    )
    try:
        deadline_s = time.monotonic() + 20
        found: list[psutil.Process] = []
        while not found and time.monotonic() < deadline_s:
            found = psutil.Process(parent.pid).children()
            time.sleep(0.02)
        (child,) = found
        while child.cpu_times().user < 0.5 and time.monotonic() < deadline_s:  # deep in its loop
            time.sleep(0.02)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    while not gone(child.pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert gone(child.pid)


def test_a_dropped_decoder_takes_its_child_with_it(wav):
    decoder = IsolatedDecoder(300.0, 20.0, MEMORY_BYTES)
    assert_works(decoder, wav)
    (child,) = children()
    del decoder  # never closed: the pipe is, and the child ends
    deadline_s = time.monotonic() + 10
    while not gone(child.pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert gone(child.pid)
