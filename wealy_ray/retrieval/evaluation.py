"""One system's ranks over one collection, tile of queries by tile of queries.

A tile is the unit of work: what it gives depends on nothing but its queries, so tiles can be shared among workers in
any way, or done again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from wealy_ray.retrieval.collection import Collection, Positives
from wealy_ray.retrieval.metrics import PER_QUERY_SCHEMA, per_query_table
from wealy_ray.retrieval.ranking import rank_positives
from wealy_ray.retrieval.scores import CPU, QUERY_TILE, Scores

VIEWS = ("all", "within_language", "cross_language")
"""`all` candidates; only those of the query's language; only those of other languages."""
TILES_ON_A_GPU = 2
"""Tiles in work at a time: scores of 256 queries with 500,000 candidates take 0.5 GB each."""


def num_tiles(collection: Collection) -> int:
    """Tiles that the collection's queries make."""
    return math.ceil(len(collection.queries) / QUERY_TILE)


def evaluate_tile(
    scores: Scores,
    collection: Collection,
    tile: int,
    *,
    views: Sequence[str] = VIEWS,
    device: torch.device = CPU,
    num_threads: int = 1,
) -> pa.Table:
    """Ranks one tile of queries.

    Args:
        scores: The system.
        collection: What it is asked about.
        tile: Number of the tile, below `num_tiles`.
        views: Which of `VIEWS`; a view without a relevant candidate has no row.
        device: Where scores are computed.
        num_threads: Threads of the counting pass on a CPU.

    Returns:
        `PER_QUERY_SCHEMA`, up to one row per query and view.
    """
    queries = collection.queries[tile * QUERY_TILE : (tile + 1) * QUERY_TILE]
    rows = scores.rows(queries, device)
    asked = _Tile(collection, queries, rows, collection.positives(queries), collection.column_of[queries])
    tables = []
    for view in views:
        if view == "all":
            ranks = rank_positives(rows, asked.positives, asked.own, num_threads)
            others = len(collection.candidates) - (asked.own >= 0)
            tables.append(per_query_table(collection, queries, ranks, others, view))
        else:
            tables += _by_language(asked, view, num_threads)
    return pa.concat_tables(tables) if tables else PER_QUERY_SCHEMA.empty_table()


def evaluate_tiles(
    scores: Scores,
    collection: Collection,
    tiles: Iterable[int],
    *,
    views: Sequence[str] = VIEWS,
    device: torch.device = CPU,
    num_threads: int = 1,
) -> list[pa.Table]:
    """`evaluate_tile` of several tiles, in their order; while a GPU ranks one, the host makes tables of another."""
    rank = partial(evaluate_tile, scores, collection, views=views, device=device, num_threads=num_threads)
    if device.type == "cpu":
        return [rank(tile) for tile in tiles]
    with ThreadPoolExecutor(TILES_ON_A_GPU) as pool:
        return list(pool.map(rank, tiles))


def evaluate(
    scores: Scores,
    collection: Collection,
    *,
    views: Sequence[str] = VIEWS,
    device: torch.device = CPU,
    num_threads: int = 1,
) -> pa.Table:
    """All tiles in this process; see `evaluate_tile`."""
    tiles = range(num_tiles(collection))
    tables = evaluate_tiles(scores, collection, tiles, views=views, device=device, num_threads=num_threads)
    return pa.concat_tables(tables) if tables else PER_QUERY_SCHEMA.empty_table()


@dataclass(frozen=True)
class _Tile:
    """Some queries with their scores float32 [num_queries, num_candidates]."""

    collection: Collection
    queries: np.ndarray
    rows: Tensor
    positives: Positives
    own: np.ndarray


def _by_language(tile: _Tile, view: str, num_threads: int) -> list[pa.Table]:
    """Ranks among the candidates of the same language, or of all others; unknown languages take no part."""
    collection, rows, positives, own = tile.collection, tile.rows, tile.positives, tile.own
    languages = collection.languages[tile.queries]
    theirs = collection.languages[collection.candidates]
    tables = []
    for language in sorted(set(languages) - {""}):
        same = theirs == language
        allowed = same if view == "within_language" else ~same & (theirs != "")
        place = np.where(allowed, np.cumsum(allowed) - 1, -1)  # column among the allowed ones
        kept, columns, sizes = [], [], []
        for i in np.flatnonzero(languages == language):
            mine = place[positives.columns[positives.offsets[i] : positives.offsets[i + 1]]]
            mine = mine[mine >= 0]
            if len(mine):
                kept.append(i)
                columns.append(mine)
                sizes.append(len(mine))
        if not kept:
            continue
        chosen = torch.from_numpy(np.flatnonzero(allowed)).to(rows.device)
        part = rows[torch.tensor(kept, device=rows.device)].index_select(1, chosen)
        offsets = np.cumsum([0, *sizes], dtype=np.int64)
        own_place = np.where(own[kept] >= 0, place[own[kept]], -1)
        ranks = rank_positives(part, Positives(offsets, np.concatenate(columns)), own_place, num_threads)
        others = allowed.sum() - (own_place >= 0)
        tables.append(per_query_table(collection, tile.queries[kept], ranks, others, view))
    return tables
