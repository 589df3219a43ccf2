"""Triplet loss on cosine distances."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wealy_ray.model.losses.pairs import pairs_of


def triplet(
    z_NZ: Tensor,
    cliques_N: Tensor,
    anchors_A: Tensor | None = None,
    *,
    margin: float,
    choice: Literal["first", "hardest"],
) -> Tensor:
    """max(0, d(anchor, positive) - d(anchor, negative) + margin), d = 1 - cosine.

    Args:
        z_NZ: See the package.
        cliques_N: See the package.
        anchors_A: See the package.
        margin: By how much a negative shall be farther than the positive.
        choice: `first` positive and negative in the order of the batch, as WEALY's released code; or the `hardest` of
            each (batch-hard, Hermans et al. 2017). An anchor without a negative counts as 0.
    """
    pairs = pairs_of(z_NZ, cliques_N, anchors_A)
    distances_AN = 1 - pairs.cosines_AN
    if choice == "first":
        positive_A = pairs.is_positive_AN.int().argmax(dim=1)  # the first of equal maxima
        negative_A = pairs.is_negative_AN.int().argmax(dim=1)
    else:
        positive_A = distances_AN.detach().masked_fill(~pairs.is_positive_AN, -torch.inf).argmax(dim=1)
        negative_A = distances_AN.detach().masked_fill(~pairs.is_negative_AN, torch.inf).argmin(dim=1)
    gap_A = (
        distances_AN.gather(1, positive_A[:, None])[:, 0]
        - distances_AN.gather(1, negative_A[:, None])[:, 0]
        + margin
    )
    has_both_A = (pairs.share_A > 0) & pairs.is_negative_AN.any(dim=1)
    return (gap_A.relu().where(has_both_A, 0) * pairs.share_A).sum()
