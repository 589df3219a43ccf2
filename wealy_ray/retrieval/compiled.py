"""Ranks by one compiled pass over each row, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from wealy_ray.retrieval.collection import Positives

FEW_VALUES = 6
"""Up to here a row is compared with one positive's score after the other, which vectorises; above by binary search."""

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
    rank_row = _compiled()
    offsets, columns = positives.offsets, positives.columns
    step = ROWS_AT_A_TIME if num_threads > 1 else len(own)

    def work(first: int) -> None:
        rank_row(scores, (offsets, columns, own), (first, min(first + step, len(own))), out)

    if num_threads == 1:
        work(0)
        return
    # small pieces: queries of large cliques take longer, and often stand together
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(0, len(own), step)))


@cache
def _compiled() -> Callable[..., None]:
    import numba

    compiled: Any = numba.njit(nogil=True)

    @compiled
    def compare(row, values, above, equal):  # type: ignore[no-untyped-def]
        for k in range(len(values)):
            value = values[k]
            gt = np.int32(0)
            ge = np.int32(0)
            for j in range(len(row)):
                gt += np.int32(row[j] > value)
                ge += np.int32(row[j] >= value)
            above[k] = gt
            equal[k] = ge - gt

    @compiled
    def search(row, values, above, equal):  # type: ignore[no-untyped-def]
        # values descend; `above` first counts the scores between value k and value k - 1
        above[:] = 0
        equal[:] = 0
        last = len(values) - 1
        for j in range(len(row)):
            score = row[j]
            if score >= values[last]:
                low, high = 0, last
                while low < high:
                    middle = (low + high) >> 1
                    if values[middle] <= score:
                        high = middle
                    else:
                        low = middle + 1
                if values[low] == score:
                    equal[low] += 1
                else:
                    above[low] += 1
        total = 0
        for k in range(len(values)):
            total += above[k]
            above[k] = total
            total += equal[k]

    @compiled
    def place(row, own, value, counts, tied, out):  # type: ignore[no-untyped-def]
        # ranks of the positives that share one score: `tied` columns, ascending
        above, rivals = counts
        unscored = value == -np.inf
        before = rivals if unscored else 0  # who stands behind all others has all rivals above
        seen = 0
        for n in range(len(tied)):
            if rivals > 0 and not unscored:
                while seen < tied[n]:  # equal scores in earlier columns, relevant ones and rivals
                    before += row[seen] == value and seen != own
                    seen += 1
                out[0, n] = above + 1 + before
            else:
                out[0, n] = above + 1 + before + n
            out[1, n] = above + 1 + n + (rivals if unscored else 0)
            out[2, n] = above + 1 + n + rivals

    @compiled
    def rank_one(row, mine, own, out):  # type: ignore[no-untyped-def]
        order = np.argsort(-row[mine], kind="mergesort")  # stable: of equal scores the lower column first
        sorted_columns = mine[order]
        scores = row[sorted_columns]
        is_new = np.ones(len(mine), np.bool_)
        is_new[1:] = scores[1:] != scores[:-1]
        starts = np.flatnonzero(is_new)
        values = scores[starts]
        above = np.empty(len(values), np.int64)
        equal = np.empty(len(values), np.int64)
        if len(values) <= FEW_VALUES:
            compare(row, values, above, equal)
        else:
            search(row, values, above, equal)
        for k in range(len(values)):
            first = starts[k]
            last = starts[k + 1] if k + 1 < len(starts) else len(mine)
            if own >= 0:  # the query is no rival of its versions
                above[k] -= row[own] > values[k]
                equal[k] -= row[own] == values[k]
            counts = (above[k], equal[k] - (last - first))
            place(row, own, values[k], counts, sorted_columns[first:last], out[:, first:last])

    @compiled
    def rank_some(scores, problem, rows, out):  # type: ignore[no-untyped-def]
        offsets, columns, own = problem
        for i in range(rows[0], rows[1]):
            start, stop = offsets[i], offsets[i + 1]
            if stop > start:
                rank_one(scores[i], columns[start:stop], own[i], out[:, start:stop])

    return rank_some
