"""Whisper's decoder weights, cast and fused once for the batched step.

Legend: D state width, L layers, V vocabulary, F = 4 D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from whisper.model import MultiHeadAttention, ResidualAttentionBlock, TextDecoder


@dataclass(frozen=True)
class Affine:
    """A linear map; weight [out, in] as `torch.nn.functional.linear` takes it."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Norm:
    """LayerNorm computed in float32 whatever the dtype around it, like whisper's."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last axis; the dtype of `x` is kept."""
        normed = nn.functional.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.epsilon)
        return normed.to(x.dtype)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder block. Queries carry the attention's 1 / sqrt(head width)."""

    self_norm: Norm
    self_qkv: Affine
    self_out: Affine
    cross_norm: Norm
    cross_query: Affine
    cross_out: Affine
    mlp_norm: Norm
    mlp_in: Affine
    mlp_out: Affine


@dataclass(frozen=True)
class DecoderWeights:
    """The whole decoder on one device in one dtype (LayerNorms and positions stay float32)."""

    token_embedding: Tensor
    """[V, D]; also the output projection."""
    position_embedding: Tensor
    layers: tuple[LayerWeights, ...]
    cross_keys: Affine
    """All layers' cross-attention keys in one map, [L D, D]."""
    cross_values: Affine
    """The same for the values."""
    final_norm: Norm
    num_heads: int

    @classmethod
    def of(cls, decoder: TextDecoder, device: torch.device, dtype: torch.dtype) -> DecoderWeights:
        """Prepare `decoder`, which is left as it is; memory is shared where nothing had to change."""
        cross = [block.cross_attn for block in decoder.blocks]
        biases = [attention.value.bias for attention in cross]
        no_biases = [torch.zeros_like(bias) for bias in biases]  # whisper's keys have none

        def stack(weights: list[Tensor], biases: list[Tensor]) -> Affine:
            return Affine(_move(torch.cat(weights), device, dtype), _move(torch.cat(biases), device, dtype))

        return cls(
            token_embedding=_move(decoder.token_embedding.weight, device, dtype),
            position_embedding=_move(decoder.positional_embedding, device, torch.float32),
            layers=tuple(_layer(block, device, dtype) for block in decoder.blocks),
            cross_keys=stack([attention.key.weight for attention in cross], no_biases),
            cross_values=stack([attention.value.weight for attention in cross], biases),
            final_norm=_norm(decoder.ln, device),
            num_heads=decoder.blocks[0].attn.n_head,
        )


def _layer(block: ResidualAttentionBlock, device: torch.device, dtype: torch.dtype) -> LayerWeights:
    def affine(linear: nn.Linear) -> Affine:
        return Affine(_move(linear.weight, device, dtype), _move(linear.bias, device, dtype))

    def scaled_query(attention: MultiHeadAttention) -> tuple[Tensor, Tensor]:
        query = attention.query
        scale = (query.weight.shape[0] // attention.n_head) ** -0.5
        return query.weight * scale, query.bias * scale

    own = block.attn
    query_weight, query_bias = scaled_query(own)
    qkv_weight = torch.cat([query_weight, own.key.weight, own.value.weight])
    qkv_bias = torch.cat([query_bias, torch.zeros_like(query_bias), own.value.bias])
    cross_weight, cross_bias = scaled_query(block.cross_attn)
    return LayerWeights(
        self_norm=_norm(block.attn_ln, device),
        self_qkv=Affine(_move(qkv_weight, device, dtype), _move(qkv_bias, device, dtype)),
        self_out=affine(own.out),
        cross_norm=_norm(block.cross_attn_ln, device),
        cross_query=Affine(_move(cross_weight, device, dtype), _move(cross_bias, device, dtype)),
        cross_out=affine(block.cross_attn.out),
        mlp_norm=_norm(block.mlp_ln, device),
        mlp_in=affine(block.mlp[0]),
        mlp_out=affine(block.mlp[2]),
    )


def _norm(norm: nn.LayerNorm, device: torch.device) -> Norm:
    return Norm(_move(norm.weight, device, torch.float32), _move(norm.bias, device, torch.float32), norm.eps)


def _move(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device=device, dtype=dtype).contiguous()
