"""What the losses share: cosines of anchors with the batch, and who belongs to whom.

Shape suffixes: N rows of the batch, A anchors, Z numbers of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Anchors against a batch.

    Attributes:
        cosines_AN: Cosine of each anchor with each row.
        is_positive_AN: bool, another row of the anchor's clique.
        is_negative_AN: bool, a row of another clique.
        share_A: Weight of each anchor in the mean over the whole batch; 0 without a positive.
    """

    cosines_AN: Tensor
    is_positive_AN: Tensor
    is_negative_AN: Tensor
    share_A: Tensor


def pairs_of(z_NZ: Tensor, cliques_N: Tensor, anchors_A: Tensor | None) -> Pairs:
    """Compares anchors with all rows; in float32 at least."""
    z_NZ = torch.nn.functional.normalize(z_NZ if z_NZ.dtype == torch.float64 else z_NZ.float(), dim=1)
    rows_N = torch.arange(len(z_NZ), device=z_NZ.device)
    anchors_A = rows_N if anchors_A is None else anchors_A
    same_AN = cliques_N[anchors_A][:, None] == cliques_N
    is_positive_AN = same_AN & (anchors_A[:, None] != rows_N)
    # an anchor counts when its clique has another row; counted over the whole batch, which every rank knows
    counts_N = (cliques_N[:, None] == cliques_N).sum(1) > 1
    share_A = counts_N[anchors_A].to(z_NZ.dtype) / counts_N.sum().clamp(min=1)
    return Pairs(z_NZ[anchors_A] @ z_NZ.T, is_positive_AN, ~same_AN, share_A)


def log_sum_exp(values_AN: Tensor, chosen_AN: Tensor) -> Tensor:
    """Log of the sum of exponentials over what is chosen [A]; a row without any gives the type's lowest number.

    Not -inf: its gradient would be NaN even where it is not used.
    """
    lowest = torch.finfo(values_AN.dtype).min
    return values_AN.masked_fill(~chosen_AN, lowest).logsumexp(dim=1)
