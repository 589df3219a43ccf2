"""A window on its way through the engine, and the future its submitter holds."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from torch import Tensor

from wealy_ray.whisper.rows import RowStart
from wealy_ray.whisper.types import Language, WindowResult

MAX_PERIOD = 32
"""Tokens of the longest sequence whose repetition the guard notices."""


class WindowFuture(Future[WindowResult]):
    """A window's result to come; `language` is known one decoder step after the window enters its slot."""

    def __init__(self) -> None:
        super().__init__()
        self.language: Future[Language] = Future()
        # Waiters may give up on it (asyncio cancels what it wraps), but only the engine completes it.
        self.language.set_running_or_notify_cancel()


@dataclass(eq=False)
class Encoding:
    """A window to be encoded, and nothing more."""

    window: Tensor
    """Log-mel [M, N]; kept until the end, so that the work can be done again."""
    future: Future[Tensor] = field(default_factory=Future)

    def fail(self, reason: BaseException) -> None:
        """Tell the waiters that nothing will come."""
        _fail((self.future,), reason)


@dataclass(eq=False)
class Decoding:
    """A window to be decoded, or only to be asked for its language."""

    window: Tensor
    """Log-mel [M, N] or features [A, D]; kept until the end, so that the work can be done again."""
    start: RowStart
    max_repeats: int | None = None
    """Of the repetition guard."""
    only_language: bool = False
    """Whether the row ends at its start of transcript."""
    future: WindowFuture = field(default_factory=WindowFuture)
    position: int = 0
    """Of the token that the next step feeds, as the host last saw it."""
    checked: int = 0
    """Sampled tokens that the guard has looked at."""

    @property
    def language(self) -> Future[Language]:
        """Known before the window is done."""
        return self.future.language

    def fail(self, reason: BaseException) -> None:
        """Tell the waiters that nothing will come."""
        _fail((self.language, self.future), reason)

    @property
    def samples(self) -> bool:
        """Whether the step at `position` samples."""
        return self.position >= len(self.start.initial) - 1

    def begin(self) -> None:
        """Its start of transcript is the next token to be fed; a prompt is fed when a slot is filled."""
        self.position, self.checked = self.start.sot, 0

    def repeats_from(self, sampled: list[int]) -> int | None:
        """Number of sampled tokens after which the guard ends the window; None: it goes on."""
        if self.max_repeats is None:
            return None
        for count in range(self.checked + 1, len(sampled) + 1):
            if _ends_in_repeats(sampled[:count], self.max_repeats):
                return count
        self.checked = len(sampled)
        return None


Request = Encoding | Decoding


def _fail(futures: tuple[Future, ...], reason: BaseException) -> None:
    for future in futures:
        # A waiter may have cancelled the future, and the language may be known already.
        with contextlib.suppress(InvalidStateError):
            future.set_exception(reason)


def _ends_in_repeats(tokens: list[int], times: int) -> bool:
    for period in range(1, min(MAX_PERIOD, len(tokens) // times) + 1):
        tail = tokens[-period * times :]
        if tail == tail[:period] * times:
            return True
    return False
