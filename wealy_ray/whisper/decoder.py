"""One decoder step over all slots, with static caches.

Legend: B rows (slots), L layers, H heads, K width of a head, D = H K, T positions, A audio positions (1500),
P prompt positions, V vocabulary.

A window's prompt is fed in one pass when it enters its slot. From its start of transcript on, a row feeds one
token per step, first its initial tokens, then what it samples; language and no-speech probability come from
the start of transcript of that same pass. A row knows its own position and ends by itself, and no operation
mixes rows, so that a row's bits depend neither on its neighbours nor on its slot.

On the CPU the matrix kernels give every row the same bits only when no row falls into a kernel's remainder
block (measured with MKL on AVX-512: row counts such as 6 break it, multiples of 4 do not). Row counts above 1
are therefore padded to a multiple of 8. On a GPU every step reads the caches up to the longest live row,
rounded up to a bucket, with one captured graph per bucket; rows are equal there up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from whisper.model import Whisper

from wealy_ray.whisper.attention import Cache, ColumnCache, Run
from wealy_ray.whisper.backend import Backend, Copy
from wealy_ray.whisper.prompt import feed_prompt
from wealy_ray.whisper.rows import Rows, RowStart
from wealy_ray.whisper.rules import SamplingRules
from wealy_ray.whisper.types import DecodeOptions
from wealy_ray.whisper.vocabulary import Vocabulary
from wealy_ray.whisper.weights import DecoderWeights, LayerWeights, Place

BUCKET = 128
"""Self-attention reads a multiple of so many positions."""


@dataclass(frozen=True)
class Step:
    """What a step is to do; the host knows, it is not asked of the device."""

    longest: int
    """No live row's position is above it when the step begins."""
    read_sot: bool = True
    """Whether a row stands at its start of transcript."""
    sample: bool = True
    """Whether a row samples. If it and `read_sot` are false, no logits are computed."""
    draw: bool = False
    """Whether a row samples at a temperature above 0."""


class SlotDecoder:
    """The decoder's weights, caches and per-slot memory.

    Args:
        model: The Whisper model; not modified.
        vocabulary: Its token ids.
        options: What is decoded.
        num_slots: Windows at a time.
        backend: Where to compute.
        dtype: What to compute in.
    """

    def __init__(
        self,
        model: Whisper,
        vocabulary: Vocabulary,
        options: DecodeOptions,
        num_slots: int,
        *,
        backend: Backend,
        dtype: torch.dtype,
    ):
        self.vocabulary, self.backend = vocabulary, backend
        self.state_block = options.state_block(model.dims.n_text_layer)
        dims, device = model.dims, backend.device
        rows = 1 if num_slots == 1 else _round_up(num_slots, backend.row_multiple)
        # One position more than is ever fed: a row that has ended goes on writing there until it is refilled.
        self.length = _round_up(dims.n_text_ctx + 1, BUCKET)
        place = Place(device, dtype, rows=rows if backend.packs else None)
        self.weights = DecoderWeights.of(model.decoder, place, positions=self.length)
        layout = Cache if backend.is_static else ColumnCache
        heads, width = dims.n_text_head, dims.n_text_state // dims.n_text_head
        # torch reads float32 more than twice as fast as bfloat16 in these products on a CPU.
        cached = torch.float32 if device.type == "cpu" else dtype
        cache = partial(layout, dims.n_text_layer, rows, heads, width=width, device=device, dtype=cached)
        self.own: Cache = cache(length=self.length)
        self.cross: Cache = cache(length=dims.n_audio_ctx)
        self.rows = Rows(rows, self.length, options.max_tokens, dims.n_text_state, dtype=dtype, device=device)
        self.rules = SamplingRules(vocabulary, rows, timestamps=options.timestamps, device=device)
        self.future_TT = torch.full((self.length, self.length), float("-inf"), device=device).triu_(1)
        self._captured: dict[tuple[int, bool], Callable[[], None]] = {}
        if backend.is_static:
            for bucket in range(BUCKET, self.length + 1, BUCKET):
                for draw in (False, True):
                    work = partial(self._step, Step(bucket - 1, draw=draw))
                    self._captured[bucket, draw] = backend.capture(work, "decoder")

    @staticmethod
    def bytes_per_slot(model: Whisper, dtype: torch.dtype) -> int:
        """Device memory of one slot: both caches, and the states."""
        dims = model.dims
        length = _round_up(dims.n_text_ctx + 1, BUCKET)
        cached = 2 * dims.n_text_layer * (length + dims.n_audio_ctx) + length
        return cached * dims.n_text_state * dtype.itemsize + 4 * dims.n_vocab * 4  # a few rows of logits

    def fill(self, slot: int, features_AD: Tensor, start: RowStart) -> None:
        """Put a window into a slot, and feed its prompt.

        Args:
            slot: A slot that is not live.
            features_AD: The encoder's output.
            start: How the window begins.
        """
        features_AD = self.backend.upload(features_AD, self.weights.token_embedding.dtype)
        self.cross.project(slot, features_AD, self.weights.cross_keys, self.weights.cross_values)
        self.own.clear(slot)
        initial = self.backend.upload(torch.tensor(start.initial))
        uniform = None
        if start.temperature > 0:
            generator = torch.Generator().manual_seed(start.seed)
            size = self.rows.uniform_BS.shape[1]
            uniform = self.backend.upload(torch.rand(size, generator=generator, dtype=torch.float64))
        if start.sot > 0:
            states_PD = feed_prompt(
                self.weights, self.own, self.cross, slot, initial[: start.sot], block=self.state_block
            )
            self.rows.states_BTD[slot, : start.sot] = states_PD
        self.rules.reset(slot)
        self.rows.start(slot, start, initial, uniform)

    def run(self, step: Step, count: int) -> None:
        """Feed `count` tokens per live row; a row that ends earlier stops by itself.

        Args:
            step: What to do; `longest` is that of the first step.
            count: More than one only where the backend is static.
        """
        if not self.backend.is_static:
            assert count == 1
            self._step(step)
            return
        for index in range(count):
            bucket = min(_round_up(step.longest + index + 1, BUCKET), self.length)
            self._captured[bucket, step.draw]()

    def flags(self) -> Copy:
        """Per row: position, whether it is live, language (index among the model's) and its probability."""
        rows = self.rows
        columns = (rows.position_B, rows.live_B, rows.language_B, rows.language_probability_B)
        return self.backend.fetch([torch.stack([column.double() for column in columns])])

    def read(self, slot: int, num_fed: int) -> Copy:
        """A row's states [n, D], its tokens and their log-probabilities [n + 1], and [no-speech probability].

        Args:
            slot: Which row.
            num_fed: n, the positions it has fed.
        """
        rows = self.rows
        states_TD = rows.states_BTD[slot, :num_fed]
        if states_TD.dtype == torch.bfloat16:  # numpy has none
            states_TD = states_TD.float()
        upto = slice(0, num_fed + 1)
        rest = (rows.tokens_BT[slot, upto], rows.logprobs_BT[slot, upto], rows.no_speech_B[slot : slot + 1])
        return self.backend.fetch([states_TD, *rest])

    def _step(self, step: Step) -> None:
        rows = self.rows
        state_BD, final_BD = self._forward(step)
        rows.states_BTD[rows.index_B, rows.position_B] = state_BD
        sampled_B = logprobs_B = None
        if step.read_sot or step.sample:
            logits_BV = self.weights.to_logits(final_BD).float()
            if step.read_sot:
                self._read_start_of_transcript(logits_BV)
            if step.sample:
                draws = (rows.temperature_B, rows.draws()) if step.draw else None
                choice = self.rules.choose(logits_BV, draws)
                self.rules.record(choice.tokens, rows.sampling())
                sampled_B, logprobs_B = choice.tokens, choice.logprobs
        rows.advance(sampled_B, logprobs_B, self.vocabulary.eot)

    def _runs(self, longest: int) -> list[Run]:
        """The rows whose caches a step reads, and how far self-attention reads them.

        A static step reads all rows equally far. On the CPU free rows are left out, and a row is read as far as
        its own position asks, lest its bits depend on its neighbours.
        """
        rows = self.rows
        if self.backend.is_static:
            return [Run(slice(0, len(rows.index_B)), _round_up(longest + 1, BUCKET))]
        runs: list[Run] = []
        for row, (live, position) in enumerate(
            zip(rows.live_B.tolist(), rows.position_B.tolist(), strict=True)
        ):
            length = _round_up(position + 1, BUCKET)
            if not live:
                continue
            if runs and runs[-1].rows.stop == row and runs[-1].length == length:
                runs[-1] = Run(slice(runs[-1].rows.start, row + 1), length)
            else:
                runs.append(Run(slice(row, row + 1), length))
        return runs

    def _forward(self, step: Step) -> tuple[Tensor, Tensor]:
        """The state to keep and the decoder's output, [B, D] each, for the token at every row's position."""
        weights, rows = self.weights, self.rows
        token_B = rows.tokens_BT[rows.index_B, rows.position_B]
        embedded_BD = weights.token_embedding[token_B].float()
        x_BD = (embedded_BD + weights.position_embedding[rows.position_B]).to(weights.token_embedding.dtype)
        future_BT = self.future_TT[rows.position_B]
        runs = self._runs(step.longest)
        whole_runs = _whole(runs, self.cross.length)
        state_BD = None
        for index, layer in enumerate(weights.layers):
            x_BD = x_BD + self._self_attention(index, layer, x_BD, future_BT, runs)
            x_BD = x_BD + self._cross_attention(index, layer, x_BD, whole_runs)
            x_BD = x_BD + layer.mlp(x_BD)
            if index == self.state_block:
                state_BD = x_BD
        final_BD = weights.final_norm(x_BD)
        return (final_BD if state_BD is None else state_BD), final_BD

    def _self_attention(
        self, index: int, layer: LayerWeights, x_BD: Tensor, future_BT: Tensor, runs: list[Run]
    ) -> Tensor:
        query_BHK, key_BHK, value_BHK = layer.own_heads(x_BD, self.own.heads)
        self.own.append(index, self.rows.position_B, key_BHK, value_BHK)
        return layer.self_out(self.own.attend(index, query_BHK, future_BT, runs))

    def _cross_attention(self, index: int, layer: LayerWeights, x_BD: Tensor, runs: list[Run]) -> Tensor:
        query_BHK = layer.cross_heads(x_BD, self.cross.heads)
        return layer.cross_out(self.cross.attend(index, query_BHK, None, runs))

    def _read_start_of_transcript(self, logits_BV: Tensor) -> None:
        """Read no-speech probability and language where a row stands at its start of transcript.

        As in whisper, languages are compared among themselves, no-speech with the whole vocabulary.
        """
        rows, vocabulary = self.rows, self.vocabulary
        here_B = rows.live_B & (rows.position_B == rows.sot_B)
        no_speech_B = (logits_BV[:, vocabulary.no_speech] - logits_BV.logsumexp(dim=1)).exp_()
        rows.no_speech_B.copy_(torch.where(here_B, no_speech_B, rows.no_speech_B))
        num_languages = len(vocabulary.language_codes)
        if num_languages == 0:
            return
        first = vocabulary.first_language
        languages = logits_BV[:, first : first + num_languages].softmax(dim=1)
        following_B = rows.sot_B + 1
        token_B = rows.tokens_BT[rows.index_B, following_B]
        language_B = torch.where(rows.detect_B, languages.argmax(dim=1), token_B - first)
        language_B = language_B.clamp_(0, num_languages - 1)
        probability_B = languages.gather(1, language_B[:, None])[:, 0]
        rows.language_B.copy_(torch.where(here_B, language_B, rows.language_B))
        rows.language_probability_B.copy_(torch.where(here_B, probability_B, rows.language_probability_B))
        token_B = torch.where(here_B & rows.detect_B, language_B + first, token_B)
        rows.tokens_BT[rows.index_B, following_B] = token_B


def _whole(runs: list[Run], length: int) -> list[Run]:
    """The same rows with all positions; neighbouring runs become one."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].rows.stop == run.rows.start:
            joined[-1] = Run(slice(joined[-1].rows.start, run.rows.stop), length)
        else:
            joined.append(Run(run.rows, length))
    return joined


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
