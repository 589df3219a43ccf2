"""What is compiled for the CPU: ranks of a row, and distances of sets of vectors. Imported where it is needed only.

Machine code is kept beside this file, or in the user's cache: the first process of a machine compiles, seconds, and no
other. Functions that call each other stand in one file, since numba looks for changes in no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

Array = np.ndarray

FEW_VALUES = 6
"""Up to here a row is compared with one positive's score after the other, which vectorises; above by binary search."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles when it is called first; where nothing can be written, in each process."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@compiled
def compare(row: Array, values: Array, above: Array, equal: Array) -> None:
    """How many scores of a row are above each value, and equal to it."""
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
def search(row: Array, values: Array, above: Array, equal: Array) -> None:
    """As `compare`, for many values, which descend."""
    # `above` first counts the scores between value k and value k - 1
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
def place(row: Array, own: int, value: float, counts: tuple[int, int], tied: Array, out: Array) -> None:
    """Ranks [3, num] of the positives that share one score: `tied` columns, ascending."""
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
def rank_one(row: Array, mine: Array, own: int, out: Array) -> None:
    """Ranks [3, num] of a query's positives, the columns `mine`."""
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
def rank_some(scores: Array, problem: tuple[Array, Array, Array], rows: tuple[int, int], out: Array) -> None:
    """`compiled.rank_rows` for the rows from `rows[0]` to `rows[1]`; `problem`: offsets, columns, own."""
    offsets, columns, own = problem
    for i in range(rows[0], rows[1]):
        start, stop = offsets[i], offsets[i + 1]
        if stop > start:
            rank_one(scores[i], columns[start:stop], own[i], out[:, start:stop])


@compiled
def nearest(distances: Array, offsets: Array, is_mean: bool, out: Array) -> None:
    """Distance to each set of columns: the least, or the mean of each row's least."""
    for c in range(len(offsets) - 1):
        total: Any = 0.0
        lowest: Any = np.float32(np.inf)
        for s in range(distances.shape[0]):
            least: Any = np.float32(np.inf)
            for t in range(offsets[c], offsets[c + 1]):
                least = min(least, distances[s, t])
            total += least
            lowest = min(lowest, least)
        out[c] = np.float32(total / distances.shape[0]) if is_mean else lowest


@compiled
def find_nearest(row: Array, start: int, stop: int, is_used: Array) -> int:
    """The column of the least distance that is not used; -1: all are."""
    best: Any = np.float32(np.inf)
    where = -1
    for t in range(start, stop):
        if not is_used[t - start] and (where < 0 or row[t] < best):
            best, where = row[t], t
    return where


@compiled
def best_pairs(distances: Array, offsets: Array, max_pairs: int, out: Array) -> None:
    """Distance to each set of columns: the mean of the best pairs without replacement, chosen greedily."""
    num_rows = distances.shape[0]
    # column of each row's nearest unused vector; -1: the row is used
    nearest_of = np.empty(num_rows, np.int64)
    for c in range(len(offsets) - 1):
        start, stop = offsets[c], offsets[c + 1]
        is_used = np.zeros(stop - start, np.bool_)
        num = min(max_pairs, num_rows, stop - start)
        for s in range(num_rows if num else 0):
            nearest_of[s] = find_nearest(distances[s], start, stop, is_used)
        total = 0.0
        for n in range(num):
            taken = -1
            for s in range(num_rows):
                if nearest_of[s] >= 0 and (
                    taken < 0 or distances[s, nearest_of[s]] < distances[taken, nearest_of[taken]]
                ):
                    taken = s
            column = nearest_of[taken]
            total += distances[taken, column]
            nearest_of[taken] = -1
            is_used[column - start] = True
            for s in range(num_rows if n + 1 < num else 0):
                if nearest_of[s] == column:
                    nearest_of[s] = find_nearest(distances[s], start, stop, is_used)
        out[c] = np.float32(total / num) if num else np.float32(np.inf)
