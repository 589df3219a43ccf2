"""The networks: states of a track in, one vector out. Cosine is taken outside.

Shape suffixes: B tracks, T positions, I numbers of a state, D inside, H heads, Z numbers of an embedding.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from typing_extensions import override

from wealy_ray.model.pooling import MeanPooling, build_pooling
from wealy_ray.model.positions import rotate, sinusoids
from wealy_ray.model.settings import AverageMLPSettings, ModelSettings, TransformerSettings


class StateNetwork(nn.Module):
    """Base: hides padding, and standardises if asked.

    Args:
        input_dim: Numbers of a state.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.register_buffer("input_mean", torch.zeros(input_dim))
        self.register_buffer("input_scale", torch.ones(input_dim))

    def set_input_statistics(self, mean_I: Tensor, deviation_I: Tensor) -> None:
        """What states are standardised by; a dimension without deviation is only shifted."""
        self.input_mean.copy_(mean_I)
        self.input_scale.copy_(torch.where(deviation_I > 0, 1 / deviation_I, 1.0))

    @override
    def forward(self, states_BTI: Tensor, lengths_B: Tensor) -> Tensor:
        """Embeds tracks.

        Args:
            states_BTI: States, anything behind a track's length.
            lengths_B: int64, states of each track, at least one.

        Returns:
            [B, Z], not normalised.
        """
        places = torch.arange(states_BTI.shape[1], device=states_BTI.device)
        is_real_BT = places < lengths_B[:, None]
        x_BTI = (states_BTI - self.input_mean) * self.input_scale
        return self.embed(x_BTI.masked_fill(~is_real_BT[..., None], 0), is_real_BT)

    def embed(self, x_BTI: Tensor, is_real_BT: Tensor) -> Tensor:
        """Embeds standardised states; padding is zero."""
        raise NotImplementedError


class Wealy(StateNetwork):
    """The paper's network (section 3; sizes of the released code)."""

    def __init__(self, settings: TransformerSettings, input_dim: int) -> None:
        super().__init__(input_dim)
        self.settings = settings
        self.project = nn.Linear(input_dim, settings.width)
        self.layers = nn.ModuleList(EncoderLayer(settings) for _ in range(settings.layers))
        self.pooling = build_pooling(settings.pooling, settings.width)
        self.out = nn.Linear(settings.width, settings.output_dim, bias=False)
        if settings.pooling == "cls":
            self.cls = nn.Parameter(torch.randn(settings.width) * 0.02)

    @override
    def embed(self, x_BTI: Tensor, is_real_BT: Tensor) -> Tensor:
        x_BTD = self.project(x_BTI)
        if self.settings.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(x_BTD.shape[1], x_BTD.shape[2], x_BTD.device).to(x_BTD.dtype)
        if self.settings.pooling == "cls":
            first = self.cls.to(x_BTD.dtype).expand(len(x_BTD), 1, -1)
            x_BTD = torch.cat([first, x_BTD], dim=1)
            is_real_BT = torch.cat([is_real_BT.new_ones(len(x_BTD), 1), is_real_BT], dim=1)
        for layer in self.layers:
            x_BTD = layer(x_BTD, is_real_BT)
        z_BZ: Tensor = self.out(self.pooling(x_BTD, is_real_BT))
        return z_BZ


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward with ReLU."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.heads, self.dropout = settings.heads, settings.dropout
        self.is_rotary = settings.positions == "rotary"
        self.norm_attention = nn.LayerNorm(settings.width)
        self.qkv = nn.Linear(settings.width, 3 * settings.width)
        self.merge = nn.Linear(settings.width, settings.width)
        self.norm_feed_forward = nn.LayerNorm(settings.width)
        self.widen = nn.Linear(settings.width, settings.feed_forward)
        self.narrow = nn.Linear(settings.feed_forward, settings.width)
        self.drop = nn.Dropout(settings.dropout)

    @override
    def forward(self, x_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
        x_BTD = x_BTD + self.drop(self._attend(self.norm_attention(x_BTD), is_real_BT))
        hidden = self.drop(self.widen(self.norm_feed_forward(x_BTD)).relu())
        return x_BTD + self.drop(self.narrow(hidden))

    def _attend(self, x_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BTD).chunk(3, dim=2)
        )
        if self.is_rotary:
            q, k = rotate(q), rotate(k)
        mixed_BHTD = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=is_real_BT[:, None, None, :], dropout_p=self.dropout if self.training else 0.0
        )
        merged: Tensor = self.merge(mixed_BHTD.transpose(1, 2).flatten(2))
        return merged


class AverageMLP(StateNetwork):
    """The paper's Avg+MLP: what is left without time."""

    def __init__(self, settings: AverageMLPSettings, input_dim: int) -> None:
        super().__init__(input_dim)
        self.settings = settings
        self.pooling = MeanPooling()
        widths = [input_dim] + [settings.width] * (settings.hidden_layers + 1)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.drop = nn.Dropout(settings.dropout)
        self.out = nn.Linear(settings.width, settings.output_dim)

    @override
    def embed(self, x_BTI: Tensor, is_real_BT: Tensor) -> Tensor:
        x_BD = self.pooling(x_BTI, is_real_BT)
        for layer in self.hidden:
            x_BD = self.drop(layer(x_BD).relu())
        z_BZ: Tensor = self.out(x_BD)
        return z_BZ


def build_model(settings: ModelSettings, input_dim: int) -> StateNetwork:
    """A network with fresh weights, drawn from torch's generator.

    Args:
        settings: What to build.
        input_dim: Numbers of a state: 1280 of Whisper turbo, 512 of base.
    """
    if isinstance(settings, AverageMLPSettings):
        return AverageMLP(settings, input_dim)
    return Wealy(settings, input_dim)
