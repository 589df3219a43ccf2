"""The contrastive loss of CLEWS (Serra et al. 2025) on one vector per track, as WEALY's released code has it."""

from __future__ import annotations

from torch import Tensor

from wealy_ray.model.losses.pairs import log_sum_exp, pairs_of


def clews(
    z_NZ: Tensor,
    cliques_N: Tensor,
    anchors_A: Tensor | None = None,
    *,
    gamma: float,
    bias: float,
    weight: float,
) -> Tensor:
    """Mean d over positives + weight * log(1 + mean over negatives of exp(bias - gamma * d)), d = 1 - cosine.

    The first part draws versions together, the second spreads the others over the sphere. An anchor without a negative
    has the first part only.
    """
    pairs = pairs_of(z_NZ, cliques_N, anchors_A)
    distances_AN = 1 - pairs.cosines_AN
    num_positives_A = pairs.is_positive_AN.sum(1).clamp(min=1)
    near_A = distances_AN.masked_fill(~pairs.is_positive_AN, 0).sum(1) / num_positives_A
    num_negatives_A = pairs.is_negative_AN.sum(1).to(distances_AN.dtype)
    log_mean_A = (
        log_sum_exp(bias - gamma * distances_AN, pairs.is_negative_AN) - num_negatives_A.clamp(min=1).log()
    )
    # log(1 + e^x), where x may be large
    far_A = log_mean_A.logaddexp(log_mean_A.new_zeros(()))
    far_A = far_A.where(num_negatives_A > 0, 0)
    return ((near_A + weight * far_A).where(pairs.share_A > 0, 0) * pairs.share_A).sum()
