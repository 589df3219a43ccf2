"""Windows of a track's states: what the network sees of a track when it embeds it."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from wealy_ray.config import Settings

STRIDE_SHARE = 10
"""Windows begin every tenth of their size: the paper's 1500 and 150."""


class StateWindows(Settings):
    """Windows over a track; a shorter track is one window."""

    mode: Literal["windows", "single"] = "windows"
    """`windows` over the whole track; or a `single` one at its beginning."""
    size: PositiveInt | None = None
    """States of a window; None: the model's crop."""
    stride: PositiveInt | None = None
    """States between two beginnings; None: a tenth of the size."""
    keep_tail: bool = True
    """Whether one more window ends with the track where the others leave states over; the authors drop them."""

    def resolved(self, crop: int) -> StateWindows:
        """With size and stride as numbers, where they matter.

        Args:
            crop: The model's.
        """
        size = self.size or crop
        if self.mode == "single":
            return StateWindows(mode="single", size=size)
        stride = self.stride or max(1, size // STRIDE_SHARE)
        return self.model_copy(update={"size": size, "stride": stride})

    def starts(self, num_states: int) -> list[int]:
        """First state of each window, ascending; of `resolved` windows.

        Args:
            num_states: States of the track that count, at least one.
        """
        assert self.size is not None, "windows are resolved first"
        last = num_states - self.size
        if self.mode == "single" or last <= 0:
            return [0]
        assert self.stride is not None, "windows are resolved first"
        stride = self.stride
        return [*range(0, last, stride), last] if self.keep_tail else [*range(0, last + 1, stride)]
