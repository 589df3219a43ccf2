"""Rows that every table needs: chance, the language alone, and the ceiling.

Their ties are broken at random, not by `track_id`: ids of one clique often stand beside each other
(`shs100k:8110-1`, `-2`), and a rule that goes by id would then find versions without knowing anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wealy_ray.retrieval.collection import NO_CLIQUE, Collection
from wealy_ray.retrieval.scores import CPU


@dataclass(eq=False)
class TrivialScores:
    """1 where a query and a candidate share a label, and a random number below 1/2 added.

    Attributes:
        labels: int64 [num_tracks]; negative: shares it with nobody.
        candidates: int64 [num_candidates].
        missing: bool [num_tracks], all False.
        seed: A query's random numbers depend on it and on the query's number alone.
    """

    labels: np.ndarray
    candidates: np.ndarray
    missing: np.ndarray
    seed: int

    def rows(self, queries: np.ndarray, device: torch.device = CPU) -> Tensor:
        """See `Scores`."""
        theirs = self.labels[self.candidates]
        out = np.empty((len(queries), len(theirs)), np.float32)
        for i, query in enumerate(queries):
            np.random.default_rng([self.seed, int(query)]).random(out=out[i], dtype=np.float32)
            out[i] /= 2
            if self.labels[query] >= 0:
                out[i] += theirs == self.labels[query]
        return torch.from_numpy(out).to(device)


def random_scores(collection: Collection, seed: int = 0) -> TrivialScores:
    """Chance."""
    return _labelled(collection, np.full(len(collection), -1, np.int64), seed)


def language_scores(collection: Collection, detected: np.ndarray, seed: int = 0) -> TrivialScores:
    """Same detected language and nothing else; `detected` has one code per track, "" where there is none."""
    _, labels = np.unique(detected.astype(str), return_inverse=True)
    return _labelled(collection, np.where(detected == "", -1, labels), seed)


def oracle_scores(collection: Collection, has_lyrics: np.ndarray, seed: int = 0) -> TrivialScores:
    """The paper's oracle: versions of a clique that both have lyrics are found, all else is chance."""
    known = has_lyrics & (collection.cliques != NO_CLIQUE)
    return _labelled(collection, np.where(known, collection.cliques, -1), seed)


def _labelled(collection: Collection, labels: np.ndarray, seed: int) -> TrivialScores:
    return TrivialScores(labels, collection.candidates, np.zeros(len(collection), bool), seed)
