"""Exact ranks of relevant candidates, without sorting what is not relevant.

A relevant candidate's score is taken out of the same rows as its rivals' scores (same bits, so that equal is equal),
and its rank is one more than what stands above it:

- higher scores stand above; of equal scores the lower column (the earlier `track_id`) does;
- the query itself is not counted;
- a candidate without a score (-inf) stands behind all that have one, and a relevant one behind all the others.

Optimistic and pessimistic ranks say what other orders of equal scores could give at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wealy_ray.retrieval.collection import Positives
from wealy_ray.retrieval.compiled import rank_rows


@dataclass(frozen=True)
class Ranks:
    """Ranks (1-based, ascending within a query) of the relevant candidates of some queries.

    Attributes:
        offsets: int64 [num_queries + 1], as in `Positives`.
        ranks: int64, ties broken by column.
        optimistic: int64, if the relevant stood first among equals.
        pessimistic: int64, if the relevant stood last among equals.
    """

    offsets: np.ndarray
    ranks: np.ndarray
    optimistic: np.ndarray
    pessimistic: np.ndarray


def rank_positives(scores: Tensor, positives: Positives, own: np.ndarray, num_threads: int = 1) -> Ranks:
    """Ranks of all positives in rows of scores.

    Args:
        scores: float32 [num_queries, num_candidates], higher is nearer, no NaN; not changed.
        positives: Relevant columns of each row.
        own: int64 [num_queries], the query's own column, -1 where it is not a candidate.
        num_threads: Threads of the pass over CPU scores.
    """
    assert scores.dtype == torch.float32, scores.dtype
    assert scores.shape[0] == len(own) == len(positives.offsets) - 1, scores.shape
    size = len(positives.columns)
    out = np.zeros((3, size), np.int64)
    if size and scores.device.type == "cpu":
        rank_rows(scores.numpy(), positives, own, out, num_threads)
    elif size:
        from wealy_ray.retrieval.counted import rank_by_counting  # Triton comes with torch for GPUs

        rank_by_counting(scores, positives, own, out)
    return Ranks(positives.offsets, *out)
