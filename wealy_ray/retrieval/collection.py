"""The tracks of an evaluation: who asks, who may answer, and what would be right.

Columns stand in the order of `track_id`; an earlier column wins a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wealy_ray.errors import ManifestError

NO_CLIQUE = -1


@dataclass(frozen=True)
class Positives:
    """Relevant candidates of some queries, as ragged rows.

    Attributes:
        offsets: int64 [num_queries + 1]; row i is `columns[offsets[i]:offsets[i + 1]]`.
        columns: int64, candidate columns, ascending within a row.
    """

    offsets: np.ndarray
    columns: np.ndarray


@dataclass(frozen=True, eq=False)
class Collection:
    """Tracks with what is known of them; every array has one entry per track, in the order of `track_ids`.

    Build it with `Collection.of`.

    Attributes:
        track_ids: Unique, ascending.
        cliques: int64, numbers of cliques; `NO_CLIQUE` for a track without one.
        clique_names: Name of clique i.
        languages: Language codes, "" where not known.
        kinds: Kinds of versions (cover, live, ...), "" where not known.
        splits: Splits, "" where there are none.
        is_query: Whether the track may ask; it must have a relevant candidate as well.
        is_candidate: Whether the track may answer.
    """

    track_ids: np.ndarray
    cliques: np.ndarray
    clique_names: Sequence[str]
    languages: np.ndarray
    kinds: np.ndarray
    splits: np.ndarray
    is_query: np.ndarray
    is_candidate: np.ndarray

    @classmethod
    def of(
        cls,
        track_ids: Sequence[str],
        cliques: Sequence[str | None],
        *,
        languages: Sequence[str | None] | None = None,
        kinds: Sequence[str | None] | None = None,
        splits: Sequence[str | None] | None = None,
        is_query: Sequence[bool] | np.ndarray | None = None,
        is_candidate: Sequence[bool] | np.ndarray | None = None,
    ) -> Collection:
        """Sorts the tracks by id and numbers the cliques.

        Args:
            track_ids: Ids, in any order.
            cliques: Clique of each, None for a distractor.
            languages: Language code of each.
            kinds: Kind of each.
            splits: Split of each.
            is_query: Which may ask; None: all.
            is_candidate: Which may answer; None: all.

        Raises:
            ManifestError: An id stands twice.
        """
        ids = np.array(track_ids, object)
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        doubled = np.flatnonzero(ids[1:] == ids[:-1])
        if len(doubled):
            raise ManifestError(f"track '{ids[doubled[0]]}' stands twice in what is to be evaluated")
        names = sorted({name for name in cliques if name is not None})
        numbers = {name: i for i, name in enumerate(names)} | {None: NO_CLIQUE}
        size = len(ids)

        def words(values: Sequence[str | None] | None) -> np.ndarray:
            return np.array([v or "" for v in values] if values is not None else [""] * size, object)[order]

        def flags(values: Sequence[bool] | np.ndarray | None) -> np.ndarray:
            return np.ones(size, bool) if values is None else np.asarray(values, bool)[order]

        return cls(
            ids,
            np.array([numbers[name] for name in cliques], np.int64)[order],
            names,
            words(languages),
            words(kinds),
            words(splits),
            flags(is_query),
            flags(is_candidate),
        )

    def __len__(self) -> int:
        return len(self.track_ids)

    @cached_property
    def candidates(self) -> np.ndarray:
        """int64 [num_candidates]: tracks that may answer; the columns of every score matrix."""
        return np.flatnonzero(self.is_candidate)

    @cached_property
    def column_of(self) -> np.ndarray:
        """int64 [num_tracks]: candidate column of a track, -1 where it has none."""
        columns = np.full(len(self), -1, np.int64)
        columns[self.candidates] = np.arange(len(self.candidates))
        return columns

    @cached_property
    def queries(self) -> np.ndarray:
        """int64 [num_queries]: tracks that ask and have a relevant candidate other than themselves."""
        sizes = np.bincount(self.cliques[self.candidates] + 1, minlength=len(self.clique_names) + 1)
        relevant = sizes[self.cliques + 1] - self.is_candidate
        return np.flatnonzero(self.is_query & (self.cliques != NO_CLIQUE) & (relevant > 0))

    @cached_property
    def clique_sizes(self) -> np.ndarray:
        """int64 [num_tracks]: tracks of the same clique, this one included; 1 without a clique."""
        sizes = np.bincount(self.cliques + 1, minlength=len(self.clique_names) + 1)[self.cliques + 1]
        return np.where(self.cliques == NO_CLIQUE, 1, sizes)

    @cached_property
    def _by_clique(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidate columns sorted by clique, and where each clique begins."""
        cliques = self.cliques[self.candidates]
        order = np.argsort(cliques, kind="stable")
        return order, np.searchsorted(cliques[order], np.arange(len(self.clique_names) + 1))

    def positives(self, queries: np.ndarray) -> Positives:
        """Relevant candidates of `queries` (tracks): the same clique, the query itself left out."""
        order, starts = self._by_clique
        rows = []
        for query in queries:
            clique = self.cliques[query]
            row = order[starts[clique] : starts[clique + 1]] if clique != NO_CLIQUE else order[:0]
            rows.append(row[row != self.column_of[query]])
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return Positives(offsets, np.concatenate(rows) if rows else np.zeros(0, np.int64))
