"""One decoder step over all slots, with static caches.

Legend: B rows (slots), L layers, H heads, K width of a head, D = H K, T longest sequence, A audio positions
(1500), P longest initial sequence, V vocabulary.

Every step has the same shapes whatever the slots hold. A row knows its own position: it feeds its initial
tokens one per step, then what it samples. Language and no-speech probability come from the row's
start-of-transcript position of that same pass. All of a row's memory lies in tensors that are written in
place, and no operation mixes rows, so that a row's bits depend neither on its neighbours nor on its slot.

On the CPU the matrix kernels give every row the same bits only when no row falls into a kernel's remainder
block (measured with MKL on AVX-512: row counts such as 6 break it, multiples of 4 do not). Row counts above 1
are therefore padded to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from whisper.model import Whisper

from wealy_ray.whisper.rules import GreedyRules
from wealy_ray.whisper.vocabulary import Vocabulary
from wealy_ray.whisper.weights import DecoderWeights, LayerWeights

CPU_ROW_MULTIPLE = 8


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that stay fixed for the decoder's life."""

    num_slots: int
    max_initial: int
    """P: longest sequence of initial tokens."""
    max_tokens: int
    """Most tokens sampled per window."""

    @property
    def length(self) -> int:
        """T: positions fed at most; the last sampled token never is."""
        return self.max_initial + self.max_tokens - 1


@dataclass(frozen=True)
class RowReading:
    """What a row has produced, on the host; valid from its start of transcript on."""

    states: np.ndarray
    """[T, D], only the positions fed."""
    language: int
    """Index among the model's languages; 0 on English-only models."""
    language_probability: float
    no_speech_prob: float
    sum_logprob: float


class SlotDecoder:
    """The decoder's weights, caches and per-slot memory.

    Args:
        model: The Whisper model; not modified.
        vocabulary: Its token ids.
        shape: Slots and lengths.
        timestamps: Whether timestamp tokens are sampled.
        device: Where to compute.
        dtype: What to compute in.
    """

    def __init__(
        self,
        model: Whisper,
        vocabulary: Vocabulary,
        shape: DecoderShape,
        *,
        timestamps: bool,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.weights = DecoderWeights.of(model.decoder, device, dtype)
        self.vocabulary = vocabulary
        self.shape = shape
        self.device = device
        dims = model.dims
        self.num_rows = _padded_rows(shape.num_slots, device)
        rows, length, width = self.num_rows, shape.length, dims.n_text_state
        heads = dims.n_text_head
        per_head = (dims.n_text_layer, rows, heads)
        head_width = width // heads

        def zeros(*size: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size, dtype=kind, device=device)

        # Values are kept transposed: both products of attention are then matrix times column.
        self.self_keys_LBHTK = zeros(*per_head, length, head_width)
        self.self_values_LBHKT = zeros(*per_head, head_width, length)
        self.cross_keys_LBHAK = zeros(*per_head, dims.n_audio_ctx, head_width)
        self.cross_values_LBHKA = zeros(*per_head, head_width, dims.n_audio_ctx)
        self.states_BTD = zeros(rows, length, width)
        self.future_TT = torch.full((length, length), float("-inf"), device=device).triu_(1)
        self.row_B = torch.arange(rows, device=device)

        integers = torch.int64
        self.live_B = zeros(rows, kind=torch.bool)
        self.position_B = zeros(rows, kind=integers)
        self.token_B = zeros(rows, kind=integers)
        self.initial_BP = zeros(rows, shape.max_initial, kind=integers)
        self.num_initial_B = zeros(rows, kind=integers)
        self.sot_B = zeros(rows, kind=integers)
        self.detect_B = zeros(rows, kind=torch.bool)
        self.language_B = zeros(rows, kind=integers)
        self.language_probability_B = zeros(rows, kind=torch.float32)
        self.no_speech_B = zeros(rows, kind=torch.float32)
        self.sum_logprob_B = zeros(rows, kind=torch.float32)
        self.rules = GreedyRules(vocabulary, rows, timestamps=timestamps, device=device)

    def fill(self, slot: int, features_AD: Tensor, initial: Sequence[int], *, detect_language: bool) -> None:
        """Put a window into a slot.

        Args:
            slot: A slot that is not live.
            features_AD: The encoder's output.
            initial: Initial token ids, start of transcript included.
            detect_language: Whether the token after the start of transcript is to be overwritten by the
                most probable language.
        """
        features_AD = features_AD.to(self.device, self.cross_keys_LBHAK.dtype)
        layers, _, heads, positions, head_width = self.cross_keys_LBHAK.shape
        keys_AX = self.weights.cross_keys(features_AD)
        self.cross_keys_LBHAK[:, slot] = keys_AX.view(positions, layers, heads, head_width).permute(
            1, 2, 0, 3
        )
        to_values = self.weights.cross_values
        values_XA = torch.addmm(to_values.bias[:, None], to_values.weight, features_AD.T)
        self.cross_values_LBHKA[:, slot] = values_XA.view(layers, heads, head_width, positions)
        # Masked positions have weight zero, but zero times a former window's overflow would be NaN.
        self.self_keys_LBHTK[:, slot] = 0
        self.self_values_LBHKT[:, slot] = 0
        self.initial_BP[slot, : len(initial)] = torch.tensor(initial, device=self.device)
        self.num_initial_B[slot] = len(initial)
        self.sot_B[slot] = initial.index(self.vocabulary.sot)
        self.detect_B[slot] = detect_language
        self.token_B[slot] = initial[0]
        self.position_B[slot] = 0
        self.sum_logprob_B[slot] = 0
        self.rules.reset(slot)
        self.live_B[slot] = True

    def release(self, slot: int) -> None:
        """Take a slot out of the computation; its caches stay until it is filled again."""
        self.live_B[slot] = False
        self.position_B[slot] = 0

    def step(self, *, read_sot: bool, sample: bool) -> Tensor:
        """Feed one token per live row.

        Args:
            read_sot: Whether a row stands at its start of transcript. The host knows; it is not asked of
                the device.
            sample: Whether a row samples. If neither holds, no logits are computed.

        Returns:
            The token that each row feeds next, [B] int64: for a sampling row the sampled one.
        """
        x_BD = self._states(self._attended())
        self.states_BTD[self.row_B, self.position_B] = x_BD
        picked_B = None
        if read_sot or sample:
            logits_BV = torch.matmul(x_BD, self.weights.token_embedding.T).float()
            if read_sot:
                self._read_start_of_transcript(logits_BV)
            if sample:
                picked_B = self._sample(logits_BV)
        following_B = (self.position_B + 1).clamp_(max=self.shape.max_initial - 1)
        next_B = self.initial_BP.gather(1, following_B[:, None])[:, 0]
        if picked_B is not None:
            next_B = torch.where(self._sampling(), picked_B, next_B)
        self.token_B.copy_(next_B)
        self.position_B += self.live_B
        return self.token_B

    def read(self, slot: int, num_states: int) -> RowReading:
        """Copy a finished row's results to the host."""
        scalars = torch.stack(
            [
                self.language_B[slot].float(),
                self.language_probability_B[slot],
                self.no_speech_B[slot],
                self.sum_logprob_B[slot],
            ]
        ).tolist()
        states_TD = self.states_BTD[slot, :num_states]
        if states_TD.dtype == torch.bfloat16:  # numpy has none
            states_TD = states_TD.float()
        return RowReading(
            states=np.array(states_TD.cpu().numpy()),
            language=int(scalars[0]),
            language_probability=scalars[1],
            no_speech_prob=scalars[2],
            sum_logprob=scalars[3],
        )

    def _attended(self) -> list[slice]:
        """The rows whose caches a step reads: runs of live rows on the CPU, all rows elsewhere.

        Attention is the one part that costs the same for every row (on the CPU it waits for memory), and its
        products are per row and head, so leaving out free slots changes no bits. On a GPU the step keeps one
        shape, so that it can be captured as a graph.
        """
        if self.device.type != "cpu":
            return [slice(0, self.num_rows)]
        live = [*self.live_B.tolist(), False]
        runs, begin = [], 0
        for row, is_live in enumerate(live):
            if not is_live:
                if row > begin:
                    runs.append(slice(begin, row))
                begin = row + 1
        return runs

    def _sampling(self) -> Tensor:
        """Bool [B]: rows whose initial tokens are all fed once this step is done."""
        return self.live_B & (self.position_B >= self.num_initial_B - 1)

    def _sample(self, logits_BV: Tensor) -> Tensor:
        choice = self.rules.choose(logits_BV)
        sampling_B = self._sampling()
        self.sum_logprob_B += torch.where(sampling_B, choice.logprobs, 0.0)
        self.rules.record(choice.tokens, sampling_B)
        return choice.tokens

    def _read_start_of_transcript(self, logits_BV: Tensor) -> None:
        """Read no-speech probability and language where a row stands at its start of transcript.

        As in whisper, languages are compared among themselves, no-speech with the whole vocabulary.
        """
        here_B = self.live_B & (self.position_B == self.sot_B)
        no_speech_B = (logits_BV[:, self.vocabulary.no_speech] - logits_BV.logsumexp(dim=1)).exp_()
        self.no_speech_B.copy_(torch.where(here_B, no_speech_B, self.no_speech_B))
        num_languages = len(self.vocabulary.language_codes)
        if num_languages == 0:
            return
        first = self.vocabulary.first_language
        languages = logits_BV[:, first : first + num_languages].softmax(dim=1)
        slot_B = self.sot_B[:, None] + 1
        given_B = self.initial_BP.gather(1, slot_B)[:, 0] - first
        language_B = torch.where(self.detect_B, languages.argmax(dim=1), given_B)
        language_B = torch.where(here_B, language_B, given_B).clamp_(0, num_languages - 1)
        probability_B = languages.gather(1, language_B[:, None])[:, 0]
        self.language_B.copy_(torch.where(here_B, language_B, self.language_B))
        self.language_probability_B.copy_(torch.where(here_B, probability_B, self.language_probability_B))
        token_B = torch.where(here_B & self.detect_B, language_B, given_B) + first
        self.initial_BP.scatter_(1, slot_B, token_B[:, None])

    def _states(self, runs: list[slice]) -> Tensor:
        """The decoder after its final LayerNorm, [B, D], for `token_B` at `position_B`."""
        weights = self.weights
        embedded_BD = weights.token_embedding[self.token_B].float()
        x_BD = (embedded_BD + weights.position_embedding[self.position_B]).to(weights.token_embedding.dtype)
        future_BT = self.future_TT[self.position_B]
        for index, layer in enumerate(weights.layers):
            x_BD = x_BD + self._self_attention(index, layer, x_BD, future_BT, runs)
            x_BD = x_BD + self._cross_attention(index, layer, x_BD, runs)
            hidden_BF = torch.nn.functional.gelu(layer.mlp_in(layer.mlp_norm(x_BD)))
            x_BD = x_BD + layer.mlp_out(hidden_BF)
        return weights.final_norm(x_BD)

    def _self_attention(
        self, index: int, layer: LayerWeights, x_BD: Tensor, future_BT: Tensor, runs: list[slice]
    ) -> Tensor:
        keys_BHTK, values_BHKT = self.self_keys_LBHTK[index], self.self_values_LBHKT[index]
        rows, heads, _, head_width = keys_BHTK.shape
        qkv = layer.self_qkv(layer.self_norm(x_BD)).view(rows, 3, heads, head_width)
        query_BHK, key_BHK, value_BHK = (part.contiguous() for part in qkv.unbind(1))
        keys_BHTK[self.row_B, :, self.position_B] = key_BHK
        values_BHKT[self.row_B, :, :, self.position_B] = value_BHK
        return layer.self_out(_attend(query_BHK, keys_BHTK, values_BHKT, future_BT, runs))

    def _cross_attention(self, index: int, layer: LayerWeights, x_BD: Tensor, runs: list[slice]) -> Tensor:
        keys_BHAK, values_BHKA = self.cross_keys_LBHAK[index], self.cross_values_LBHKA[index]
        rows, heads, _, head_width = keys_BHAK.shape
        query_BHK = layer.cross_query(layer.cross_norm(x_BD)).view(rows, heads, head_width)
        return layer.cross_out(_attend(query_BHK, keys_BHAK, values_BHKA, None, runs))


def _attend(
    query_BHK: Tensor, keys_BHSK: Tensor, values_BHKS: Tensor, bias_BS: Tensor | None, runs: list[slice]
) -> Tensor:
    """Attention of one query per row; batched matrix products, since torch's CPU SDPA is slow for one query.

    Args:
        query_BHK: Scaled queries.
        keys_BHSK: Keys of S positions.
        values_BHKS: Values, transposed.
        bias_BS: Added to the scores; -inf forbids a position.
        runs: The rows to read keys and values of; the other rows' output is zero.

    Returns:
        [B, D], heads side by side.
    """
    scores_BHS = _products(keys_BHSK, query_BHK, runs).float()
    if bias_BS is not None:
        scores_BHS += bias_BS[:, None]
    weights_BHS = scores_BHS.softmax(dim=2).to(values_BHKS.dtype)
    return _products(values_BHKS, weights_BHS, runs).flatten(1)


def _products(matrices: Tensor, vectors: Tensor, runs: list[slice]) -> Tensor:
    """[B, H, m, n] times [B, H, n], as one batched matrix product per run of rows; zero elsewhere.

    The columns are given to it as transposed rows: with these strides MKL takes a kernel that reads memory
    4 to 6 times as fast as the one it takes for a contiguous [n, 1].
    """
    products = vectors.new_zeros(matrices.shape[:3])
    for run in runs:
        columns = vectors[run].flatten(0, 1)[:, None].transpose(1, 2)
        product = torch.bmm(matrices[run].flatten(0, 1), columns)
        products[run] = product.view(products[run].shape)
    return products


def _padded_rows(num_slots: int, device: torch.device) -> int:
    if device.type != "cpu" or num_slots == 1:
        return num_slots
    return -(-num_slots // CPU_ROW_MULTIPLE) * CPU_ROW_MULTIPLE
