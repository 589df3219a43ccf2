"""Ranks by one Triton pass over each row: what a GPU runs. Imported only where scores lie on one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from wealy_ray.retrieval.collection import Positives

BLOCK = 4096
"""Columns that a program holds in registers; two counts of so many fit into the halves of an int32."""


def rank_by_counting(scores: Tensor, positives: Positives, own: np.ndarray, out: np.ndarray) -> None:
    """The ranks of `wealy_ray.retrieval.ranking`.

    Args:
        scores: float32 [num_queries, num_candidates]; a row's scores lie side by side.
        positives: Relevant columns, at least one.
        own: int64 [num_queries].
        out: int64 [3, num_positives], filled with ranks, optimistic and pessimistic ones.
    """
    assert scores.stride(1) == 1, scores.stride()
    num_rows, num_columns = scores.shape
    sizes = np.diff(positives.offsets)
    row_of = np.repeat(np.arange(num_rows), sizes)
    columns = torch.from_numpy(positives.columns).to(scores.device)
    values = scores[torch.from_numpy(row_of).to(scores.device), columns]
    counts = torch.zeros(3, len(columns), dtype=torch.int32, device=scores.device)
    _count[triton.cdiv(num_columns, BLOCK), num_rows](
        scores,
        scores.stride(0),
        num_columns,
        torch.from_numpy(own).to(scores.device),
        torch.from_numpy(positives.offsets).to(scores.device),
        columns,
        values,
        *counts,
        BLOCK=BLOCK,
    )
    above, equal, before = counts.cpu().numpy().astype(np.int64)
    found = values.cpu().numpy()
    number, tied = _ties(row_of, found, positives.columns) if equal.max() > 1 else (0, 1)
    rivals = equal - tied
    unscored = np.isneginf(found)
    best = above + 1 + number + np.where(unscored, rivals, 0)
    worst = above + 1 + number + rivals
    ranks = np.where(unscored, worst, above + 1 + before)
    ascending = np.argsort(row_of * (num_columns + 1) + ranks, kind="stable")  # within each query
    out[:] = np.stack([ranks, best, worst])[:, ascending]


def _ties(row_of: np.ndarray, values: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each positive, its place among the positives with its score, and how many these are."""
    order = np.lexsort((columns, values, row_of))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(row_of[order]) != 0) | (values[order][1:] != values[order][:-1])
    first, group = np.flatnonzero(is_new), np.cumsum(is_new) - 1
    number, tied = np.empty((2, len(order)), np.int64)
    number[order] = np.arange(len(order)) - first[group]
    tied[order] = np.bincount(group)[group]
    return number, tied


@triton.jit
def _count(  # type: ignore[no-untyped-def]
    scores,
    stride,
    num_columns,
    own,
    offsets,
    columns,
    values,
    above,
    equal,
    before,
    BLOCK: tl.constexpr,
) -> Any:
    # Adds, for every positive of a row, how many of the block's scores are higher, are equal, and of the equal
    # ones how many stand in lower columns. NaN is neither: it stands for the query itself and for no column.
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row.to(tl.int64) * stride + column, column < num_columns, float("nan"))
    score = tl.where(column == tl.load(own + row), float("nan"), score)
    for p in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        value = tl.load(values + p)
        both = tl.sum((score > value).to(tl.int32) + ((score >= value).to(tl.int32) << 16))
        higher, reaching = both & 0xFFFF, both >> 16
        if reaching > 0:
            tl.atomic_add(above + p, higher)
            if reaching > higher:
                tl.atomic_add(equal + p, reaching - higher)
                earlier = (score == value) & (column < tl.load(columns + p))
                tl.atomic_add(before + p, tl.sum(earlier.to(tl.int32)))
