"""Whisper's encoder at fixed batch shapes.

Legend: B batch rows, M mel bins, N mel frames (3000), A audio positions (1500), D state width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override
from whisper.model import AudioEncoder, MultiHeadAttention, Whisper

from wealy_ray.whisper.backend import Backend
from wealy_ray.whisper.linear import PackedLinear, affine, can_pack, multiply_transposed


class BatchEncoder:
    """Encodes windows in padded batches: on the CPU always of one size, on a GPU of powers of two up to it.

    Args:
        model: The Whisper model; not modified.
        batch: Windows per call at most.
        backend: Where to compute.
        dtype: What to compute in. LayerNorms stay float32, like whisper's, but on a GPU: there they take their input
            as it is, which torch still sums in float32.
    """

    def __init__(self, model: Whisper, batch: int, *, backend: Backend, dtype: torch.dtype):
        self.batch, self.backend, self.dtype = batch, backend, dtype
        rows = batch * model.dims.n_audio_ctx
        self._encoder = prepared_encoder(model.encoder, backend, dtype, rows)
        mel_shape = (model.dims.n_mels, 2 * model.dims.n_audio_ctx)
        self._mels_BMN = torch.zeros((batch, *mel_shape), device=backend.device, dtype=dtype)
        features_shape = (model.dims.n_audio_ctx, model.dims.n_audio_state)
        self._features_BAD = torch.zeros((batch, *features_shape), device=backend.device, dtype=dtype)
        sizes = {batch} | (
            {1 << power for power in range(batch.bit_length())} if backend.is_static else set()
        )
        self._encode: dict[int, Callable[[], None]] = {}
        for size in sorted(sizes, reverse=True):  # the largest takes the memory that the others share
            self._encode[size] = backend.capture(partial(self._forward, size), "encoder")

    def encode(self, mels: list[Tensor]) -> list[Tensor]:
        """Encode up to `batch` windows.

        Args:
            mels: Log-mel windows, each [M, N].

        Returns:
            Features [A, D] per window, in order.
        """
        assert 0 < len(mels) <= self.batch, len(mels)
        size = min(size for size in self._encode if size >= len(mels))
        for row, mel_MN in enumerate(mels):
            self._mels_BMN[row] = self.backend.upload(mel_MN)
            self.backend.keep(mel_MN)
        self._mels_BMN[len(mels) : size] = 0
        self._encode[size]()
        return list(self._features_BAD[: len(mels)].clone().unbind(0))

    def _forward(self, size: int) -> None:
        self._features_BAD[:size] = self._encoder(self._mels_BMN[:size])


class _OneDnnAttention(nn.Module):
    """Self-attention of an encoder block for a CPU, head by head through oneDNN.

    torch's fused attention multiplies with MKL (see `linear`): measured on an EPYC, this is 1.4 times as fast in
    float32 and 2.2 times in bfloat16.
    """

    QUERIES = 750
    """Scores of so many queries are made at a time, 4.5 MB: half a window."""

    def __init__(self, attention: MultiHeadAttention, rows: int):
        super().__init__()
        self.heads = attention.n_head
        scale = (attention.query.weight.shape[0] // self.heads) ** -0.5
        query, key, value = attention.query, attention.key, attention.value
        weight = torch.cat([query.weight * scale, key.weight, value.weight]).detach()
        bias = torch.cat([query.bias * scale, torch.zeros_like(query.bias), value.bias]).detach()
        self.qkv = affine(weight, bias, rows=rows)
        self.out = affine(attention.out.weight.detach(), attention.out.bias.detach(), rows=rows)

    @override
    def forward(self, x_BAD: Tensor, mask: None = None, kv_cache: None = None) -> tuple[Tensor, None]:
        """As whisper's module is called by its block."""
        batch, positions, width = x_BAD.shape
        qkv = self.qkv(x_BAD).view(batch, positions, 3, self.heads, width // self.heads)
        query_BHAK, key_BHAK, value_BHAK = (part.transpose(1, 2).contiguous() for part in qkv.unbind(2))
        value_BHKA = value_BHAK.transpose(2, 3).contiguous()
        attended_BAHK = x_BAD.new_empty(batch, positions, self.heads, width // self.heads)
        for row in range(batch):
            for head in range(self.heads):
                for first in range(0, positions, self.QUERIES):
                    some = slice(first, first + self.QUERIES)
                    scores_QA = multiply_transposed(query_BHAK[row, head, some], key_BHAK[row, head])
                    weights_QA = scores_QA.softmax(dim=1)
                    attended_BAHK[row, some, head] = multiply_transposed(weights_QA, value_BHKA[row, head])
        return self.out(attended_BAHK.flatten(2)), None


def prepared_encoder(encoder: AudioEncoder, backend: Backend, dtype: torch.dtype, rows: int) -> nn.Module:
    """A copy with linear and convolution weights in `dtype`; linear maps packed for `rows` where that helps."""
    # One copy per engine: the model stays as it is, and may be on another device.
    encoder = copy.deepcopy(encoder)
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.to(dtype)
    encoder.to(backend.device)
    encoder.blocks[0].register_forward_pre_hook(_side_by_side)
    if not backend.packs:
        encoder.ln_post = _without_casts(encoder.ln_post, dtype)
        for block in encoder.blocks:
            block.attn_ln = _without_casts(block.attn_ln, dtype)
            block.mlp_ln = _without_casts(block.mlp_ln, dtype)
    elif can_pack(dtype):
        for block in encoder.blocks:
            block.attn = _OneDnnAttention(block.attn, rows)
            block.mlp[0], block.mlp[2] = PackedLinear(block.mlp[0], rows), PackedLinear(block.mlp[2], rows)
    return encoder


def _side_by_side(_block: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Puts the numbers of a position side by side in memory.

    Whisper goes on with a permuted view, whose layout every sum inherits: all sums and casts of all blocks would walk
    through memory in strides, which took a sixth of a GPU's time.
    """
    (x_BAD,) = args
    return (x_BAD.contiguous(),)


def _without_casts(norm: nn.LayerNorm, dtype: torch.dtype) -> nn.LayerNorm:
    """The same LayerNorm without whisper's casts to float32 and back, three passes over memory instead of one."""
    plain = nn.LayerNorm(norm.normalized_shape, norm.eps).to(norm.weight.device, dtype)
    plain.load_state_dict(norm.state_dict())
    return plain.requires_grad_(False)
