"""Two systems as one: weighted distances, reciprocal ranks, weights learned on validation pairs.

A fused distance is `D = D_a + weight * D_b`. Scores are negated distances up to a constant (a cosine is `1 - D`), and a
constant changes no rank, so sums are made of scores. What counts as scored in a row are the finite entries; the query
itself takes no part in statistics and ranks.

A candidate without a score in one system gets that system's worst score (or rank) among the row's scored candidates:
known to be no better than the rest, and not hidden from the other system. Where a system scores nothing of a row, it
contributes nothing. Without a score in both, a candidate has none (-inf).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from wealy_ray.errors import ConfigError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.ranking import rank_positives
from wealy_ray.retrieval.scores import CPU, QUERY_TILE, Scores, empty_rows

Normalise = Literal["none", "z_score", "min_max"]
"""Scores as they are; in standard deviations of the row; on the row's range."""
BLOCK_ROWS = 16
"""Rows that are fused at a time, the last block padded: bounds float64 memory, and fixes the shape of every sum."""
RRF_K = 60
"""Cormack, Clarke and Buettcher (SIGIR 2009)."""


@dataclass(eq=False)
class FusedScores(ABC):
    """Two systems over one collection.

    Attributes:
        a: First system.
        b: Second system.
        column_of: int64 [num_tracks], `Collection.column_of`.
        missing: bool [num_tracks], what neither system knows.
    """

    a: Scores
    b: Scores
    column_of: np.ndarray
    missing: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.missing = self.a.missing & self.b.missing

    def rows(self, queries: np.ndarray, device: torch.device = CPU) -> Tensor:
        """See `Scores`."""
        out = empty_rows(len(queries), int((self.column_of >= 0).sum()), device)
        for first, a, b, is_own in _blocks(self.a, self.b, self.column_of[queries], queries, device):
            fused = self._fuse(a, b, is_own).masked_fill_(_unscored(a, b), -torch.inf)
            part = out[first : first + BLOCK_ROWS]
            part.copy_(fused[: len(part)])
        return out

    @abstractmethod
    def _fuse(self, a: Tensor, b: Tensor, is_own: Tensor) -> Tensor:
        """Float64 scores of one block of rows; what both leave unscored is hidden afterwards."""


@dataclass(eq=False)
class WeightedScores(FusedScores):
    """`D = D_a + weight * D_b`, each normalised over the query's scored candidates.

    Attributes:
        weight: Weight of the second system.
        normalise: See `Normalise`; a row without spread becomes zeros.
    """

    weight: float
    normalise: Normalise = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_normalise(self.normalise)

    @override
    def _fuse(self, a: Tensor, b: Tensor, is_own: Tensor) -> Tensor:
        a, b = _normalised(a, is_own, self.normalise), _normalised(b, is_own, self.normalise)
        return a.add_(b, alpha=self.weight)


@dataclass(eq=False)
class LearnedFusion(FusedScores):
    """Log-odds that two tracks belong together, `weight_a * score_a + weight_b * score_b`; see `fit_fusion`.

    Attributes:
        weight_a: Weight of the first system.
        weight_b: Weight of the second system.
    """

    weight_a: float
    weight_b: float

    @override
    def _fuse(self, a: Tensor, b: Tensor, is_own: Tensor) -> Tensor:
        a, b = _normalised(a, is_own, "none"), _normalised(b, is_own, "none")
        return a.mul_(self.weight_a).add_(b, alpha=self.weight_b)


@dataclass(eq=False)
class RankFusion(FusedScores):
    """Reciprocal rank fusion: `1 / (k + rank_a) + 1 / (k + rank_b)`.

    Ranks are 1-based, equal scores in the order of the columns. Far down a row, neighbours may become equal in
    float32; the column then decides, as everywhere. The query itself has -inf.

    Attributes:
        k: Damps the first ranks.
    """

    k: int = RRF_K

    @override
    def _fuse(self, a: Tensor, b: Tensor, is_own: Tensor) -> Tensor:
        fused = _reciprocal_ranks(a, is_own, self.k).add_(_reciprocal_ranks(b, is_own, self.k))
        return fused.masked_fill_(is_own, -torch.inf)


def fit_fusion(
    a: Scores,
    b: Scores,
    collection: Collection,
    *,
    num_negatives: int = 100,
    seed: int = 0,
    device: torch.device = CPU,
) -> LearnedFusion:
    """Learns both weights by logistic regression on pairs: give it validation tracks, never those of the test.

    All relevant pairs and, for every query, a sample of irrelevant ones; pairs that neither system scores are left
    out. Features are standardised for the fit, so that its penalty treats both systems alike, and the weights are
    given back for the scores as they are.

    Args:
        a: First system.
        b: Second system.
        collection: Validation tracks.
        num_negatives: Irrelevant candidates per query; all, where there are fewer.
        seed: Of the sample; what is drawn for a query depends on the query alone.
        device: Where scores are computed.

    Raises:
        ConfigError: Without both kinds of pairs, or without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as e:
        raise ConfigError(
            "learned fusion needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from e

    features, labels = [], []
    for queries in _query_tiles(collection):
        own, positives = collection.column_of[queries], collection.positives(queries)
        for first, a_rows, b_rows, is_own in _blocks(a, b, own, queries, device):
            unscored = _unscored(a_rows, b_rows)
            both = torch.stack(
                [_normalised(a_rows, is_own, "none"), _normalised(b_rows, is_own, "none")], dim=2
            )
            for i in range(min(BLOCK_ROWS, len(queries) - first)):
                query = first + i
                mine = positives.columns[positives.offsets[query] : positives.offsets[query + 1]]
                columns, is_positive = _pairs(
                    mine, own[query], unscored.shape[1], num_negatives, [seed, int(queries[query])]
                )
                chosen = torch.from_numpy(columns).to(device)
                scored = ~unscored[i, chosen].cpu().numpy()
                features.append(both[i, chosen].cpu().numpy()[scored])
                labels.append(is_positive[scored])
    x = np.concatenate(features) if features else np.zeros((0, 2))
    y = np.concatenate(labels) if labels else np.zeros(0, bool)
    if not y.any() or y.all():
        raise ConfigError(
            f"learned fusion needs scored pairs that belong together and pairs that do not; there are {int(y.sum())} "
            f"and {int((~y).sum())}"
        )
    spread = x.std(axis=0)
    spread[spread == 0] = 1
    model = LogisticRegression(max_iter=1000).fit((x - x.mean(axis=0)) / spread, y)
    weight_a, weight_b = model.coef_[0] / spread
    return LearnedFusion(a, b, collection.column_of, float(weight_a), float(weight_b))


def choose_weight(
    a: Scores,
    b: Scores,
    collection: Collection,
    weights: Sequence[float],
    normalise: Normalise = "none",
    *,
    device: torch.device = CPU,
) -> tuple[list[tuple[float, float]], float]:
    """MAP of `WeightedScores` at several weights; give it validation tracks, never those of the test.

    Args:
        a: First system.
        b: Second system.
        collection: Validation tracks.
        weights: Weights to try.
        normalise: See `Normalise`.
        device: Where scores are computed.

    Returns:
        (weight, MAP) in the order of `weights`, and the best weight: of equals the smallest.

    Raises:
        ConfigError: No weights, or no query.
    """
    _check_normalise(normalise)
    if not weights:
        raise ConfigError("there are no fusion weights to choose from")
    if not len(collection.queries):
        raise ConfigError("a fusion weight cannot be chosen: no validation track has a relevant candidate")
    totals = np.zeros(len(weights))
    for queries in _query_tiles(collection):
        own = collection.column_of[queries]
        for first, a_rows, b_rows, is_own in _blocks(a, b, own, queries, device):
            block = slice(first, min(first + BLOCK_ROWS, len(queries)))
            positives = collection.positives(queries[block])
            unscored = _unscored(a_rows, b_rows)
            a_part, b_part = (_normalised(x, is_own, normalise) for x in (a_rows, b_rows))
            for n, weight in enumerate(weights):
                fused = a_part.add(b_part, alpha=weight).masked_fill_(unscored, -torch.inf).float()
                ranks = rank_positives(fused[: len(own[block])], positives, own[block])
                starts, sizes = ranks.offsets[:-1], np.diff(ranks.offsets)
                place = np.arange(1, len(ranks.ranks) + 1) - np.repeat(starts, sizes)
                totals[n] += (np.add.reduceat(place / ranks.ranks, starts) / sizes).sum()
    curve = [(w, float(total / len(collection.queries))) for w, total in zip(weights, totals, strict=True)]
    best = min(curve, key=lambda point: (-point[1], point[0]))[0]
    return curve, best


def _check_normalise(normalise: str) -> None:
    if normalise not in get_args(Normalise):
        raise ConfigError(f"unknown normalisation '{normalise}'; there are {', '.join(get_args(Normalise))}")


def _query_tiles(collection: Collection) -> Iterator[np.ndarray]:
    for first in range(0, len(collection.queries), QUERY_TILE):
        yield collection.queries[first : first + QUERY_TILE]


def _blocks(
    a: Scores, b: Scores, own: np.ndarray, queries: np.ndarray, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Rows of both systems, `BLOCK_ROWS` at a time: first row, a, b [BLOCK_ROWS, columns], and who is the query."""
    a_rows, b_rows = a.rows(queries, device), b.rows(queries, device)
    assert a_rows.shape == b_rows.shape, (a_rows.shape, b_rows.shape)
    for first in range(0, len(queries), BLOCK_ROWS):
        a_block, b_block = (
            torch.full((BLOCK_ROWS, a_rows.shape[1]), -torch.inf, device=device) for _ in range(2)
        )
        num = min(BLOCK_ROWS, len(queries) - first)
        a_block[:num] = a_rows[first : first + num]
        b_block[:num] = b_rows[first : first + num]
        is_own = torch.zeros(a_block.shape, dtype=torch.bool, device=device)
        for i, column in enumerate(own[first : first + num]):
            if column >= 0:
                is_own[i, column] = True
        yield first, a_block, b_block, is_own


def _unscored(a: Tensor, b: Tensor) -> Tensor:
    return (a == -torch.inf) & (b == -torch.inf)


def _normalised(scores: Tensor, is_own: Tensor, normalise: Normalise) -> Tensor:
    """Float64 scores of a block, normalised, with the worst score where there is none."""
    values = scores.double()
    counted = values.isfinite() & ~is_own
    worst = values.masked_fill(~counted, torch.inf).amin(dim=1, keepdim=True)
    worst = worst.where(worst.isfinite(), 0.0)  # nothing is scored: nothing to contribute
    values = values.where(values.isfinite(), worst)
    if normalise == "none":
        return values
    if normalise == "min_max":
        origin = values.masked_fill(~counted, -torch.inf).amax(dim=1, keepdim=True)
        spread = origin - worst
    else:
        number = counted.sum(dim=1, keepdim=True).clamp(min=1)
        origin = values.masked_fill(~counted, 0).sum(dim=1, keepdim=True) / number
        squares = (values - origin).square().masked_fill(~counted, 0)
        spread = (squares.sum(dim=1, keepdim=True) / number).sqrt()
        # equal values may differ from their mean by a rounding, which is not to be blown up
        is_flat = values.masked_fill(~counted, -torch.inf).amax(dim=1, keepdim=True) <= worst
        spread = spread.masked_fill(is_flat, 0)
    has_spread = (spread > 0) & spread.isfinite()
    return ((values - origin) / spread).where(has_spread, 0.0)


def _reciprocal_ranks(scores: Tensor, is_own: Tensor, k: int) -> Tensor:
    """Float64 [BLOCK_ROWS, columns]; the last scored candidate's where there is no score, 0 in a row without any."""
    hidden = scores.masked_fill(is_own, -torch.inf)
    order = hidden.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device).expand(scores.shape)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    num_scored = (hidden > -torch.inf).sum(dim=1, keepdim=True)
    return (1.0 / (k + torch.minimum(ranks, num_scored).double())).where(num_scored > 0, 0.0)


def _pairs(
    mine: np.ndarray, own: int, num_columns: int, num_negatives: int, seed: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A query's relevant columns and a sample of the others, and which is which."""
    others = np.setdiff1d(np.arange(num_columns), np.append(mine, own))
    num = min(num_negatives, len(others))
    drawn = np.random.default_rng(seed).choice(others, num, replace=False) if num else others[:0]
    return np.concatenate([mine, drawn]), np.arange(len(mine) + num) < len(mine)
