"""What the decoder remembers of each slot, in tensors that are written in place.

Legend: B rows (slots), T positions, S sampled tokens at most, D state width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowStart:
    """How a window begins, as the decoder needs it."""

    initial: list[int]
    """Initial token ids in order: prompt, start of transcript, language, task, no-timestamps."""
    sot: int
    """Position of the start of transcript."""
    end: int
    """The row ends at this position at the latest: it is the last one fed."""
    detect_language: bool = False
    """Whether the token after the start of transcript is to be overwritten by the most probable language."""
    temperature: float = 0.0
    seed: int = 0
    """Of the draws at a temperature above 0."""


class Rows:
    """Per-slot memory of the decoder.

    Args:
        rows: B.
        length: T.
        max_tokens: S.
        width: D.
        dtype: Of the states.
        device: Where it lies.
    """

    def __init__(
        self, rows: int, length: int, max_tokens: int, width: int, *, dtype: torch.dtype, device: torch.device
    ):
        def zeros(*size: int, kind: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=kind, device=device)

        integers, floats = torch.int64, torch.float32
        self.index_B = torch.arange(rows, device=device)
        self.live_B = zeros(rows, kind=torch.bool)
        self.position_B = zeros(rows, kind=integers)
        """The position that the next step feeds."""
        self.tokens_BT = zeros(rows, length, kind=integers)
        """Tokens by position: the initial ones, then what was sampled."""
        self.logprobs_BT = zeros(rows, length, kind=floats)
        """Log-probability of the token at each position, where it was sampled."""
        self.states_BTD = zeros(rows, length, width, kind=dtype)
        self.num_initial_B = zeros(rows, kind=integers)
        self.end_B = zeros(rows, kind=integers)
        self.sot_B = zeros(rows, kind=integers)
        self.detect_B = zeros(rows, kind=torch.bool)
        self.language_B = zeros(rows, kind=integers)
        self.language_probability_B = zeros(rows, kind=floats)
        self.no_speech_B = zeros(rows, kind=floats)
        self.temperature_B = zeros(rows, kind=floats)
        self.uniform_BS = zeros(rows, max_tokens, kind=torch.float64)
        """One number in [0, 1) per sampled token, drawn when the row starts."""

    def start(self, row: int, start: RowStart, initial: Tensor, uniform: Tensor | None) -> None:
        """Begin a row at its start of transcript.

        Args:
            row: Which one; it must not be live.
            start: How it begins.
            initial: `start.initial` on the device.
            uniform: Draws in [0, 1) on the device, [S]; None at temperature 0.
        """
        self.tokens_BT[row, : len(initial)] = initial
        self.num_initial_B[row] = len(initial)
        self.end_B[row] = start.end
        self.sot_B[row] = start.sot
        self.position_B[row] = start.sot
        self.detect_B[row] = start.detect_language
        self.temperature_B[row] = start.temperature
        if uniform is not None:
            self.uniform_BS[row] = uniform
        self.live_B[row] = True

    def sampling(self) -> Tensor:
        """Bool [B]: rows that sample once the present step is done, their initial tokens being fed."""
        return self.live_B & (self.position_B >= self.num_initial_B - 1)

    def draws(self) -> Tensor:
        """float64 [B]: each row's number in [0, 1) for the token that it samples in this step."""
        index_B = (self.position_B - self.num_initial_B + 1).clamp_(0, self.uniform_BS.shape[1] - 1)
        return self.uniform_BS.gather(1, index_B[:, None])[:, 0]

    def advance(self, sampled_B: Tensor | None, logprobs_B: Tensor | None, eot: int) -> None:
        """Take in what was sampled and move every live row on by one position.

        Args:
            sampled_B: A token per row, or None when no row samples.
            logprobs_B: Their log-probabilities.
            eot: The token that ends a row.
        """
        going_on_B = self.live_B & (self.position_B < self.end_B)
        if sampled_B is not None and logprobs_B is not None:
            sampling_B = self.sampling()
            following_B = self.position_B + 1
            token_B = torch.where(sampling_B, sampled_B, self.tokens_BT[self.index_B, following_B])
            self.tokens_BT[self.index_B, following_B] = token_B
            self.logprobs_BT[self.index_B, following_B] = torch.where(sampling_B, logprobs_B, 0.0)
            going_on_B &= ~(sampling_B & (sampled_B == eot))
        self.position_B += self.live_B
        self.live_B.copy_(going_on_B)

    def stop(self, row: int) -> None:
        """End a row from outside."""
        self.live_B[row] = False
