"""Whisper's decoder weights, cast and fused once for the batched step.

Legend: D state width, L layers, V vocabulary, F = 4 D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from whisper.model import MultiHeadAttention, ResidualAttentionBlock, TextDecoder

from wealy_ray.whisper.linear import Affine, affine

NUM_AUDIO_POSITIONS = 1500


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

    def own_heads(self, x_BD: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of self-attention, [B, H, K] each."""
        qkv = self.self_qkv(self.self_norm(x_BD)).view(len(x_BD), 3, heads, -1)
        query_BHK, key_BHK, value_BHK = (part.contiguous() for part in qkv.unbind(1))
        return query_BHK, key_BHK, value_BHK

    def cross_heads(self, x_BD: Tensor, heads: int) -> Tensor:
        """Query of cross-attention, [B, H, K]."""
        return self.cross_query(self.cross_norm(x_BD)).view(len(x_BD), heads, -1)

    def mlp(self, x_BD: Tensor) -> Tensor:
        """What the two-layer network adds, [B, D]."""
        return self.mlp_out(nn.functional.gelu(self.mlp_in(self.mlp_norm(x_BD))))


@dataclass(frozen=True)
class DecoderWeights:
    """The whole decoder on one device in one dtype (LayerNorms and positions stay float32)."""

    token_embedding: Tensor
    """[V, D]."""
    position_embedding: Tensor
    """float32, padded with zeros: a row that has ended may stand behind the model's last position."""
    layers: tuple[LayerWeights, ...]
    cross_keys: Affine
    """All layers' cross-attention keys in one map, [L D, D]."""
    cross_values: Affine
    """The same for the values."""
    final_norm: Norm
    to_logits: Affine
    """The token embedding again."""

    @classmethod
    def of(cls, decoder: TextDecoder, place: Place, *, positions: int) -> DecoderWeights:
        """Prepare `decoder`, which is left as it is; memory is shared where nothing had to change.

        Args:
            decoder: Whisper's.
            place: Where to put it.
            positions: Rows of the position embedding, at least the model's.
        """
        cross = [block.cross_attn for block in decoder.blocks]
        embedding, tokens = decoder.positional_embedding, decoder.token_embedding.weight
        padded = nn.functional.pad(embedding, (0, 0, 0, positions - len(embedding)))
        keys = torch.cat([attention.key.weight for attention in cross])
        values = torch.cat([attention.value.weight for attention in cross])
        value_biases = torch.cat([attention.value.bias for attention in cross])
        windows = Place(place.device, place.dtype, rows=place.rows and NUM_AUDIO_POSITIONS)
        return cls(
            token_embedding=place.tensor(tokens),
            position_embedding=padded.detach().to(place.device, torch.float32),
            layers=tuple(_layer(block, place) for block in decoder.blocks),
            cross_keys=windows.affine(keys, None),  # whisper's keys have no bias
            cross_values=windows.affine(values, value_biases, transposes=True),
            final_norm=place.norm(decoder.ln),
            to_logits=place.affine(tokens, None),
        )


@dataclass(frozen=True)
class Place:
    """Where weights go, and how."""

    device: torch.device
    dtype: torch.dtype
    rows: int | None
    """Linear maps are packed for inputs of so many rows; None: not packed."""

    def tensor(self, tensor: Tensor) -> Tensor:
        """A tensor in its place; the tensor itself if it is there."""
        return tensor.detach().to(self.device, self.dtype).contiguous()

    def affine(self, weight: Tensor, bias: Tensor | None, *, transposes: bool = False) -> Affine:
        """A linear map; `transposes` as in `linear.affine`."""
        bias = None if bias is None else self.tensor(bias)
        return affine(self.tensor(weight), bias, rows=self.rows, transposes=transposes)

    def linear(self, linear: nn.Linear) -> Affine:
        """The map of a module."""
        return self.affine(linear.weight, linear.bias)

    def norm(self, norm: nn.LayerNorm) -> Norm:
        """The LayerNorm of a module, in float32."""
        weight, bias = (parameter.detach().to(self.device, torch.float32) for parameter in norm.parameters())
        return Norm(weight, bias, norm.eps)


def _layer(block: ResidualAttentionBlock, place: Place) -> LayerWeights:
    def scaled_query(attention: MultiHeadAttention) -> tuple[Tensor, Tensor]:
        query = attention.query
        scale = (query.weight.shape[0] // attention.n_head) ** -0.5
        return query.weight * scale, query.bias * scale

    own = block.attn
    query_weight, query_bias = scaled_query(own)
    qkv_weight = torch.cat([query_weight, own.key.weight, own.value.weight])
    qkv_bias = torch.cat([query_bias, torch.zeros_like(query_bias), own.value.bias])
    return LayerWeights(
        self_norm=place.norm(block.attn_ln),
        self_qkv=place.affine(qkv_weight, qkv_bias),
        self_out=place.linear(own.out),
        cross_norm=place.norm(block.cross_attn_ln),
        cross_query=place.affine(*scaled_query(block.cross_attn)),
        cross_out=place.linear(block.cross_attn.out),
        mlp_norm=place.norm(block.mlp_ln),
        mlp_in=place.linear(block.mlp[0]),
        mlp_out=place.linear(block.mlp[2]),
    )
