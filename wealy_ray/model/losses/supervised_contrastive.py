"""Supervised contrastive loss (Khosla et al. 2020, equation 2: the mean over positives is outside the log)."""

from __future__ import annotations

from torch import Tensor

from wealy_ray.model.losses.pairs import log_sum_exp, pairs_of


def supervised_contrastive(
    z_NZ: Tensor, cliques_N: Tensor, anchors_A: Tensor | None = None, *, temperature: float
) -> Tensor:
    """-mean over positives of log( e^(s/t) / sum over all others e^(s/t) ), s the cosine."""
    pairs = pairs_of(z_NZ, cliques_N, anchors_A)
    logits_AN = pairs.cosines_AN / temperature
    others_A = log_sum_exp(logits_AN, pairs.is_positive_AN | pairs.is_negative_AN)
    num_positives_A = pairs.is_positive_AN.sum(1).clamp(min=1)
    positives_A = logits_AN.masked_fill(~pairs.is_positive_AN, 0).sum(1) / num_positives_A
    return ((others_A - positives_A).where(pairs.share_A > 0, 0) * pairs.share_A).sum()
