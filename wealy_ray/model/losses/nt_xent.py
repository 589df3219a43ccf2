"""NT-Xent with several positives per anchor, as WEALY trains."""

from __future__ import annotations

from torch import Tensor

from wealy_ray.model.losses.pairs import log_sum_exp, pairs_of


def nt_xent(
    z_NZ: Tensor, cliques_N: Tensor, anchors_A: Tensor | None = None, *, temperature: float
) -> Tensor:
    """-log( sum over positives e^(s/t) / sum over all others e^(s/t) ), s the cosine.

    The positives stand in one sum (WEALY's released code); `supervised_contrastive` averages over them.
    """
    pairs = pairs_of(z_NZ, cliques_N, anchors_A)
    logits_AN = pairs.cosines_AN / temperature
    positives_A = log_sum_exp(logits_AN, pairs.is_positive_AN)
    others_A = log_sum_exp(logits_AN, pairs.is_positive_AN | pairs.is_negative_AN)
    return ((others_A - positives_A).where(pairs.share_A > 0, 0) * pairs.share_A).sum()
