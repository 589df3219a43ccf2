"""Ranks by one compiled pass over each row, on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from wealy_ray.retrieval.collection import Positives

ROWS_AT_A_TIME = 64
"""Rows that a thread takes."""


def rank_rows(
    scores: np.ndarray, positives: Positives, own: np.ndarray, out: np.ndarray, num_threads: int
) -> None:
    """The ranks of `wealy_ray.retrieval.ranking`.

    Args:
        scores: float32 [num_queries, num_candidates].
        positives: Relevant columns.
        own: int64 [num_queries].
        out: int64 [3, num_positives], filled with ranks, optimistic and pessimistic ones.
        num_threads: Rows are shared among so many.
    """
    from wealy_ray.retrieval.kernels import rank_some

    offsets, columns = positives.offsets, positives.columns
    step = ROWS_AT_A_TIME if num_threads > 1 else len(own)

    def work(first: int) -> None:
        rank_some(scores, (offsets, columns, own), (first, min(first + step, len(own))), out)

    if num_threads == 1:
        work(0)
        return
    # small pieces: queries of large cliques take longer, and often stand together
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(0, len(own), step)))
