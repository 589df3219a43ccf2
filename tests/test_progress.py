from __future__ import annotations

import io

from wealy_ray.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rates_leave_out_what_earlier_runs_did() -> None:
    clock = Clock()
    progress = Progress(100, 40, interval_s=30, stream=io.StringIO(), clock=clock)
    clock.now_s += 10
    progress.add(20, failed=3, audio_s=500.0)
    assert (
        progress.line() == "60/100 tracks (60.0 %), 2.00 tracks/s, 50.0 s of audio per s, ETA 20 s, 3 failed"
    )
    clock.now_s += 10
    progress.add(40, failed=0, audio_s=500.0)
    assert "100/100 tracks (100.0 %)" in progress.line()
    assert "ETA done" in progress.line()


def test_the_rate_follows_the_last_minutes() -> None:
    clock = Clock()
    progress = Progress(10_000, stream=io.StringIO(), clock=clock)
    for tracks in [1] * 60 + [10] * 60:  # one event every 10 s: slow for 10 minutes, then ten times as fast
        clock.now_s += 10
        progress.add(tracks, 0, 0.0)
    assert "1.00 tracks/s" in progress.line()


def test_a_log_gets_a_line_per_interval_and_the_last_one() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, interval_s=30, stream=stream, clock=clock)
    for _ in range(10):
        clock.now_s += 10
        progress.add(1, 0, 1.0)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == ["3", "6", "9", "10"]
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_one_live_line() -> None:
    clock, stream = Clock(), Terminal()
    progress = Progress(2, stream=stream, clock=clock)
    for _ in range(2):
        clock.now_s += 1
        progress.add(1, 0, 1.0)
    progress.close()
    assert stream.getvalue().count("\r") == 3
    assert stream.getvalue().count("\n") == 1


def test_nothing_done_yet_has_no_eta() -> None:
    progress = Progress(5, stream=io.StringIO(), clock=Clock())
    assert "ETA unknown" in progress.line()
