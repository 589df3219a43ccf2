"""From one vector per position to one per track; padding takes no part.

Shape suffixes: B tracks, T positions, D numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

GEM_START = 3.0
"""Exponent before training, as in WEALY's code."""
GEM_LEAST = 1e-6
"""Values are clamped from below: a power of a negative number is none."""


class Pooling(nn.Module):
    """Base of the poolings."""

    def forward(self, x_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
        """Pools.

        Args:
            x_BTD: Vectors; finite at padded positions too.
            is_real_BT: bool, at least one True per track.

        Returns:
            [B, D].
        """
        raise NotImplementedError


class MeanPooling(Pooling):
    """The mean."""

    @override
    def forward(self, x_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
        return _mean(x_BTD, is_real_BT)


class GeMPooling(Pooling):
    """Generalised mean (Radenovic et al. 2018) with a learned exponent per channel, `1 + softplus(p)`.

    WEALY's own code pools padding as well; this one does not.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        start = torch.expm1(torch.tensor(GEM_START - 1)).log()  # the inverse of softplus
        self.raw_exponent = nn.Parameter(start.repeat(width))

    @override
    def forward(self, x_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
        # powers in float32: in half precision they leave its range
        exponent_D = 1 + nn.functional.softplus(self.raw_exponent.float())
        powers_BTD = x_BTD.float().clamp(min=GEM_LEAST).pow(exponent_D)
        return _mean(powers_BTD, is_real_BT).pow(1 / exponent_D).to(x_BTD.dtype)


class AttentionPooling(Pooling):
    """A weighted mean; each position is weighed by a learned map of itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(width, 1)

    @override
    def forward(self, x_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
        weights_BT = self.weigh(x_BTD)[..., 0].masked_fill(~is_real_BT, -torch.inf).softmax(dim=1)
        return (weights_BT[..., None] * x_BTD).sum(dim=1)


class FirstPooling(Pooling):
    """The first position, where the CLS token stands."""

    @override
    def forward(self, x_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
        return x_BTD[:, 0]


def build_pooling(name: str, width: int) -> Pooling:
    """A pooling by its name in `TransformerSettings`."""
    if name == "gem":
        return GeMPooling(width)
    if name == "attention":
        return AttentionPooling(width)
    return {"mean": MeanPooling, "cls": FirstPooling}[name]()


def _mean(x_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
    kept_BTD = x_BTD.masked_fill(~is_real_BT[..., None], 0)
    return kept_BTD.sum(dim=1) / is_real_BT.sum(dim=1, keepdim=True)
