"""All tokens of a window's prompt in one pass, as stock Whisper feeds them.

Legend: P prompt positions, H heads, K width of a head, D = H K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from wealy_ray.whisper.attention import Cache
from wealy_ray.whisper.weights import DecoderWeights

ROW_MULTIPLE = 8
"""Prompts are padded to a multiple of so many positions, so that few shapes occur."""


def feed_prompt(
    weights: DecoderWeights, own: Cache, cross: Cache, row: int, tokens_P: Tensor, *, block: int | None
) -> Tensor:
    """Write a prompt's keys and values into a row's cache.

    Args:
        weights: The decoder's.
        own: Cache of self-attention; positions [0, P) of `row` are written.
        cross: Cache of cross-attention, already holding the window.
        row: The slot.
        tokens_P: Token ids, at least one.
        block: Whose output is the state; None: the final LayerNorm's.

    Returns:
        The states of the prompt, [P, D].
    """
    num_tokens, heads = len(tokens_P), own.heads
    padded_P = torch.nn.functional.pad(tokens_P, (0, -num_tokens % ROW_MULTIPLE))
    embedded_PD = weights.token_embedding[padded_P].float()
    x_PD = (embedded_PD + weights.position_embedding[: len(padded_P)]).to(weights.token_embedding.dtype)
    state_PD = None
    for index, layer in enumerate(weights.layers):
        query_HPK, key_HPK, value_HPK = (part.transpose(0, 1) for part in layer.own_heads(x_PD, heads))
        own.put(index, row, key_HPK[:, :num_tokens], value_HPK[:, :num_tokens])
        x_PD = x_PD + layer.self_out(_attend(query_HPK, key_HPK, value_HPK, is_causal=True))
        query_HPK = layer.cross_heads(x_PD, heads).transpose(0, 1)
        x_PD = x_PD + layer.cross_out(_attend(query_HPK, *cross.row(index, row), is_causal=False))
        x_PD = x_PD + layer.mlp(x_PD)
        if index == block:
            state_PD = x_PD
    return (weights.final_norm(x_PD) if state_PD is None else state_PD)[:num_tokens]


def _attend(query_HPK: Tensor, keys_HSK: Tensor, values_HSK: Tensor, *, is_causal: bool) -> Tensor:
    """[P, D] from scaled queries."""
    query = query_HPK[None].to(keys_HSK.dtype)
    attended_HPK = scaled_dot_product_attention(
        query, keys_HSK[None], values_HSK[None], is_causal=is_causal, scale=1.0
    )[0]
    return attended_HPK.transpose(0, 1).flatten(1).to(query_HPK.dtype)
