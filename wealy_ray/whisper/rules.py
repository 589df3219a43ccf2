"""Choice of the next token under whisper's rules, for all rows at once and without a host sync.

Legend: B rows (slots), V vocabulary, R timestamp tokens (0.00 s to 30.00 s), P parts of the vocabulary.

The vocabulary has three parts: text (below EOT), control (EOT up to the first timestamp) and timestamps.
Rules forbid whole parts, so each part is reduced once to its maximum and its log-sum-exp, and the rules
then work on [B, P] numbers instead of [B, V] ones. The rules themselves are those of
`whisper.decoding.ApplyTimestampRules` (openai-whisper 20250625):

* the first sampled token is a timestamp, of at most 1.0 s;
* timestamps come in pairs (end, start), except before EOT; they never decrease, and no segment is empty;
* when the timestamps together are more probable than every other single token, a timestamp is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wealy_ray.whisper.vocabulary import Vocabulary

MAX_INITIAL_TIMESTAMP = 50  # tokens of 0.02 s: 1.0 s
NEVER = float("-inf")


@dataclass(frozen=True)
class Choice:
    """The rules' verdict: token ids [B] int64 and their log-probabilities [B] float32 under the rules."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


class SamplingRules:
    """Suppression and timestamp rules with their memory of what each row has sampled.

    Args:
        vocabulary: The model's token ids.
        num_rows: B.
        timestamps: Whether timestamp tokens are sampled at all.
        device: Where logits live.
    """

    def __init__(self, vocabulary: Vocabulary, num_rows: int, *, timestamps: bool, device: torch.device):
        self.timestamps = timestamps
        self.eot = vocabulary.eot
        self.timestamp_begin = vocabulary.timestamp_begin
        self.suppressed = torch.tensor(vocabulary.suppressed(timestamps=timestamps), device=device)
        self.blank = torch.tensor(vocabulary.blank(), device=device)
        self.first_B = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.last_is_timestamp_B = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.penultimate_is_timestamp_B = torch.ones(num_rows, dtype=torch.bool, device=device)
        # Index of the latest timestamp, -1 before the first one.
        self.latest_timestamp_B = torch.full((num_rows,), -1, dtype=torch.int64, device=device)

    def reset(self, row: int) -> None:
        """Forget what `row` has sampled."""
        self.first_B[row] = True
        self.last_is_timestamp_B[row] = False
        self.penultimate_is_timestamp_B[row] = True
        self.latest_timestamp_B[row] = -1

    def choose(
        self, logits_BV: torch.Tensor, draws: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Choice:
        """Pick the most probable allowed token of every row, or draw one.

        Args:
            logits_BV: float32 logits of the next token; overwritten.
            draws: Temperatures [B] and numbers in [0, 1) [B]: rows with a temperature above 0 draw from the
                allowed tokens' distribution at that temperature. A row's choice does not depend on whether
                other rows draw.

        Returns:
            The choice; rows that are not sampling get one too, to be ignored.
        """
        logits_BV.index_fill_(1, self.suppressed, NEVER)
        blank_logits = logits_BV.index_select(1, self.blank)
        logits_BV.index_copy_(1, self.blank, blank_logits.masked_fill_(self.first_B[:, None], NEVER))
        if self.timestamps:
            self._timestamps_of(logits_BV).masked_fill_(self._forbidden_timestamps(logits_BV.shape[1]), NEVER)
        drawable_BV = None if draws is None else logits_BV.clone()
        if self.timestamps:
            choice, off_BP = self._choose_with_timestamps(logits_BV)
        else:
            top_B, token_B = logits_BV.max(dim=1)
            choice = Choice(token_B, top_B - _log_sum_exp(logits_BV, top_B))
            off_BP = torch.zeros(len(top_B), 2, dtype=torch.bool, device=top_B.device)
        if draws is None or drawable_BV is None:
            return choice
        drawable_BV[:, : self.eot].masked_fill_(off_BP[:, :1], NEVER)
        drawable_BV[:, self.eot : self.timestamp_begin].masked_fill_(off_BP[:, 1:2], NEVER)
        temperature_B, uniform_B = draws
        drawn = _draw(drawable_BV, temperature_B, uniform_B)
        draws_B = temperature_B > 0
        return Choice(
            torch.where(draws_B, drawn.tokens, choice.tokens),
            torch.where(draws_B, drawn.logprobs, choice.logprobs),
        )

    def _timestamps_of(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return logits_BV[:, self.timestamp_begin :]

    def _choose_with_timestamps(self, logits_BV: torch.Tensor) -> tuple[Choice, torch.Tensor]:
        """The most probable token, and bool [B, P]: the parts of the vocabulary that the rules forbid."""
        begins = (0, self.eot, self.timestamp_begin)
        parts = (
            logits_BV[:, : self.eot],
            logits_BV[:, self.eot : self.timestamp_begin],
            self._timestamps_of(logits_BV),
        )
        tops, tokens, sums = [], [], []
        for begin, logits_BX in zip(begins, parts, strict=True):
            top_B, index_B = logits_BX.max(dim=1)
            tops.append(top_B)
            tokens.append(index_B + begin)
            sums.append(_log_sum_exp(logits_BX, top_B))
        top_BP, sum_BP = torch.stack(tops, dim=1), torch.stack(sums, dim=1)

        ends_a_segment_B = self.last_is_timestamp_B & ~self.penultimate_is_timestamp_B
        text_off_B = self.first_B | ends_a_segment_B
        off_BP = torch.stack([text_off_B, self.first_B, torch.zeros_like(text_off_B)], dim=1)
        top_BP.masked_fill_(off_BP, NEVER)
        sum_BP.masked_fill_(off_BP, NEVER)
        # Log-probabilities in whisper; the common normaliser cancels in the comparison.
        timestamp_wins_B = sum_BP[:, 2] > top_BP[:, :2].amax(dim=1)
        off_BP[:, :2] |= timestamp_wins_B[:, None]
        top_BP.masked_fill_(off_BP, NEVER)
        sum_BP.masked_fill_(off_BP, NEVER)

        top_B, part_B = top_BP.max(dim=1)
        token_B = torch.stack(tokens, dim=1).gather(1, part_B[:, None])[:, 0]
        return Choice(token_B, top_B - sum_BP.logsumexp(dim=1)), off_BP

    def _forbidden_timestamps(self, num_vocabulary: int) -> torch.Tensor:
        """Bool [B, R]: the timestamps that each row's past rules out."""
        num_timestamps = num_vocabulary - self.timestamp_begin
        after_pair_B = self.last_is_timestamp_B & self.penultimate_is_timestamp_B
        # A segment may start where the last one ended, but it may not end where it started.
        repeats_B = self.last_is_timestamp_B & ~self.penultimate_is_timestamp_B
        floor_B = self.latest_timestamp_B + (~repeats_B).long()
        ceiling_B = torch.full_like(floor_B, num_timestamps).masked_fill_(self.first_B, MAX_INITIAL_TIMESTAMP)
        index_R = torch.arange(num_timestamps, device=floor_B.device)
        below_BR = index_R < floor_B[:, None]
        above_BR = index_R > ceiling_B[:, None]
        return below_BR | above_BR | after_pair_B[:, None]

    def record(self, token_B: torch.Tensor, sampling_B: torch.Tensor) -> None:
        """Remember the sampled tokens of the rows in `sampling_B`."""
        index_B = token_B - self.timestamp_begin
        is_timestamp_B = index_B >= 0
        keep_B = ~sampling_B
        # A row with one token counts its missing penultimate as a timestamp, as whisper does.
        penultimate_B = self.last_is_timestamp_B | self.first_B
        self.penultimate_is_timestamp_B.copy_(
            torch.where(keep_B, self.penultimate_is_timestamp_B, penultimate_B)
        )
        self.last_is_timestamp_B.copy_(torch.where(keep_B, self.last_is_timestamp_B, is_timestamp_B))
        self.latest_timestamp_B.copy_(
            torch.where(sampling_B & is_timestamp_B, index_B, self.latest_timestamp_B)
        )
        self.first_B &= keep_B


def _draw(logits_BV: torch.Tensor, temperature_B: torch.Tensor, uniform_B: torch.Tensor) -> Choice:
    """Draw by the inverse of the cumulated distribution; log-probabilities are those without temperature."""
    scaled_BV = logits_BV / temperature_B.masked_fill(temperature_B <= 0, 1.0)[:, None]
    cumulated_BV = scaled_BV.softmax(dim=1).double().cumsum_(dim=1)
    # Strictly above, so that a token of probability zero is never drawn.
    below_B1 = (uniform_B * cumulated_BV[:, -1])[:, None]
    token_B1 = torch.searchsorted(cumulated_BV, below_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)
    logprob_B = logits_BV.gather(1, token_B1)[:, 0] - logits_BV.logsumexp(dim=1)
    return Choice(token_B1[:, 0], logprob_B)


def _log_sum_exp(logits_BX: torch.Tensor, top_B: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over the last axis, given its maximum; -inf where all is forbidden. Overwrites the logits."""
    shift_B = top_B.masked_fill(top_B == NEVER, 0.0)
    return logits_BX.sub_(shift_B[:, None]).exp_().sum(dim=1).log_() + shift_B
