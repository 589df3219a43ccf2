"""Ranks by torch alone, on any device: the pass that a GPU runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wealy_ray.retrieval.collection import Positives

CHUNK = 65_536
"""Columns that are searched at a time: bounds the indices' memory."""


def rank_by_search(scores: Tensor, positives: Positives, own: np.ndarray, out: np.ndarray) -> None:
    """The ranks of `wealy_ray.retrieval.ranking`, by a binary search of every score among the row's positives.

    Args:
        scores: float32 [num_queries, num_candidates].
        positives: Relevant columns, at least one.
        own: int64 [num_queries].
        out: int64 [3, num_positives], filled with ranks, optimistic and pessimistic ones.
    """
    device, num_columns = scores.device, scores.shape[1]
    sizes = np.diff(positives.offsets)
    keep = np.flatnonzero(sizes)
    num_rows, width = len(keep), int(sizes.max())
    filled = np.arange(width) < sizes[keep][:, None]
    padded = np.zeros((num_rows, width), np.int64)
    padded[filled] = positives.columns
    columns, is_positive = torch.from_numpy(padded).to(device), torch.from_numpy(filled).to(device)
    own_t = torch.from_numpy(own[keep]).to(device)
    rows = scores if num_rows == len(sizes) else scores[torch.from_numpy(keep).to(device)]
    # +inf behind the row's own positives: nothing is above it, and it is cut off in the end
    values = rows.gather(1, columns).masked_fill(~is_positive, torch.inf)
    sorted_values, order = values.sort(dim=1, stable=True)  # ascending
    ge_first = torch.zeros(num_rows, width + 1, dtype=torch.int64, device=device)
    gt_first = torch.zeros_like(ge_first)
    for start in range(0, num_columns, CHUNK):
        chunk = rows[:, start : start + CHUNK].contiguous()
        one = torch.ones(1, dtype=torch.int64, device=device).expand(chunk.shape)
        # how many values a score reaches (right=True: or equals), and how many it surpasses
        ge_first.scatter_add_(1, torch.searchsorted(sorted_values, chunk, right=True), one)
        gt_first.scatter_add_(1, torch.searchsorted(sorted_values, chunk, right=False), one)
    ge = _at_least(ge_first)
    gt = _at_least(gt_first)
    own_score = rows.gather(1, own_t.clamp(min=0)[:, None])
    has_own = (own_t >= 0)[:, None]
    ge = ge - (has_own & (own_score >= sorted_values)).long()
    gt = gt - (has_own & (own_score > sorted_values)).long()
    gt, ge = (torch.empty_like(x).scatter_(1, order, x) for x in (gt, ge))
    tied = (values[:, :, None] == values[:, None, :]) & is_positive[:, None, :]
    number = (tied & (columns[:, None, :] < columns[:, :, None])).sum(2)  # place among the tied positives
    rivals = ge - gt - tied.sum(2)
    unscored = values == -torch.inf
    ranks = gt + 1 + number + torch.where(unscored, rivals, 0)
    for i, k in torch.nonzero((rivals > 0) & ~unscored & is_positive).tolist():
        earlier = rows[i, : int(columns[i, k])] == values[i, k]
        is_own = int(0 <= own_t[i] < columns[i, k] and bool(own_score[i, 0] == values[i, k]))
        ranks[i, k] = gt[i, k] + 1 + earlier.sum() - is_own
    best = gt + 1 + number + torch.where(unscored, rivals, 0)
    worst = gt + 1 + number + rivals
    found = torch.stack([ranks, best, worst]).cpu().numpy()[:, filled]
    # ascending within each query, as on the CPU
    row_of = np.repeat(np.arange(num_rows), sizes[keep])
    by_rank = np.lexsort((found[0], row_of))
    out[:] = found[:, by_rank]


def _at_least(counts: Tensor) -> Tensor:
    """From counts by number of values reached [n, width + 1] to, per value, how many scores reach it."""
    return counts.flip(1).cumsum(1).flip(1)[:, 1:]
