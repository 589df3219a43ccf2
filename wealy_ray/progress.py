"""Progress in tracks: done/total, tracks/s, audio seconds per second, ETA, failures.

In a terminal one live line; in a job log a plain line every `interval_s` seconds.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

RATE_SPAN_S = 300.0
"""Rates are of the last five minutes, so that start-up and pauses leave the ETA soon."""


class Line:
    """A line about a long job: live in a terminal, every `interval_s` seconds in a log.

    Args:
        interval_s: Distance of two lines in a log, in seconds.
        stream: Where lines go; a terminal gets one live line.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        interval_s: float,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.live = self.stream.isatty()
        self._interval_s = 0.5 if self.live else interval_s
        self._clock = clock
        self._last_s = clock()

    def tick(self, words: Callable[[], str]) -> None:
        """Shows the line when it is due."""
        now_s = self._clock()
        if now_s - self._last_s >= self._interval_s:
            self._last_s = now_s
            self._show(words())

    def close(self, words: Callable[[], str]) -> None:
        """Shows the last line."""
        self._show(words())
        if self.live:
            self.stream.write("\n")
            self.stream.flush()

    def _show(self, words: str) -> None:
        self.stream.write(f"\r\x1b[K{words}" if self.live else f"{words}\n")
        self.stream.flush()


class Progress:
    """Counts finished tracks and says so.

    Args:
        total: Tracks of the job.
        already_done: Tracks that earlier runs finished; they count in done/total, not in the rates.
        interval_s: Distance of two lines in a log, in seconds.
        stream: Where lines go; a terminal gets one live line.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        total: int,
        already_done: int = 0,
        *,
        interval_s: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.failed, self.audio_s = total, already_done, 0, 0.0
        self._line = Line(interval_s, stream, clock)
        self._clock = clock
        self._seen: deque[tuple[float, int, float]] = deque([(clock(), already_done, 0.0)])

    def add(self, tracks: int, failed: int, audio_s: float) -> None:
        """Counts finished tracks (`failed` of them failed; `audio_s` seconds of audio) and shows the line."""
        self.done += tracks
        self.failed += failed
        self.audio_s += audio_s
        self._seen.append((self._clock(), self.done, self.audio_s))
        self.tick()

    def tick(self) -> None:
        """Shows the line when it is due; call it also while nothing finishes."""
        self._line.tick(self.line)

    def line(self) -> str:
        """The current line."""
        now_s = self._clock()
        while len(self._seen) > 2 and now_s - self._seen[0][0] > RATE_SPAN_S:
            self._seen.popleft()
        then_s, then_done, then_audio_s = self._seen[0]
        span_s = max(now_s - then_s, 1e-9)
        tracks_per_s = (self.done - then_done) / span_s
        left = self.total - self.done
        eta = "done" if left <= 0 else in_words(left / tracks_per_s) if tracks_per_s > 0 else "unknown"
        share = f"{100 * self.done / self.total:.1f} %" if self.total else "100 %"
        audio = f"{(self.audio_s - then_audio_s) / span_s:.1f} s of audio per s, " if self.audio_s else ""
        return (
            f"{self.done}/{self.total} tracks ({share}), {tracks_per_s:.2f} tracks/s, {audio}"
            f"ETA {eta}, {self.failed} failed"
        )

    def close(self) -> None:
        """Shows the last line."""
        self._line.close(self.line)


def in_words(seconds: float) -> str:
    """A duration as people say it: `2 h 05 min`, `3 min 07 s`, `12 s`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{s} s"
