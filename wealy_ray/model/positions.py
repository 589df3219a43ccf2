"""Where a state stands in its crop, as numbers: sinusoids that are added, or rotations of queries and keys.

Shape suffixes: B tracks, H heads, T positions, D numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BASE = 10_000.0
"""Longest wavelength over 2 pi (Vaswani et al. 2017; RoFormer takes the same)."""


def _angles(length: int, pairs: int, device: torch.device) -> Tensor:
    """Float32 [length, pairs]: position times the frequency of each pair of dimensions."""
    frequencies = torch.exp(torch.arange(pairs, device=device) * (-math.log(BASE) / pairs))
    return torch.arange(length, device=device)[:, None] * frequencies


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines [length, width], to be added to the inputs; an odd width ends with a sine."""
    angles = _angles(length, (width + 1) // 2, device)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]


def rotate(x_BHTD: Tensor) -> Tensor:
    """Turns each pair of neighbouring dimensions by position times frequency (RoFormer, Su et al. 2021).

    The product of a rotated query and a rotated key depends on their distance alone.
    """
    length, width = x_BHTD.shape[2:]
    angles = _angles(length, width // 2, x_BHTD.device)
    cos, sin = angles.cos().to(x_BHTD.dtype), angles.sin().to(x_BHTD.dtype)
    even, odd = x_BHTD[..., 0::2], x_BHTD[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
