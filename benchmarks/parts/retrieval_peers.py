"""MAP as others compute it; each takes unit vectors [n, d] and clique numbers [n] and returns MAP.

Queries without another version in their clique count in none of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

BLOCK = 256


def full_argsort(vectors: np.ndarray, cliques: np.ndarray) -> float:
    """Sorts every row with torch."""
    v, c = torch.from_numpy(vectors), torch.from_numpy(cliques)
    values = []
    for start in range(0, len(v), BLOCK):
        scores = v[start : start + BLOCK] @ v.T
        mine = torch.arange(start, start + len(scores))
        scores[torch.arange(len(scores)), mine] = -torch.inf
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :-1]
        hits = (c[order] == c[mine][:, None]).double()
        precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
        values.append((precision * hits).sum(1) / hits.sum(1))
    found = torch.cat(values)
    return float(found[~found.isnan()].mean())


def faiss_flat(vectors: np.ndarray, cliques: np.ndarray) -> float:
    """Exact search for all neighbours, k = n, by faiss's flat index."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    values = []
    for start in range(0, len(vectors), BLOCK):
        _, order = index.search(vectors[start : start + BLOCK], len(vectors))
        for i, row in enumerate(order):
            others = row[row != start + i]
            ranks = np.flatnonzero(cliques[others] == cliques[start + i]) + 1
            if len(ranks):
                values.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    return float(np.mean(values))


def pytorch_metric_learning(vectors: np.ndarray, cliques: np.ndarray) -> float:
    """Its AccuracyCalculator with k = all."""
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    calculator = AccuracyCalculator(
        include=("mean_average_precision",),
        k=len(vectors) - 1,
        knn_func=CustomKNN(CosineSimilarity(), batch_size=BLOCK),
        device=torch.device("cpu"),
    )
    v, c = torch.from_numpy(vectors), torch.from_numpy(cliques)
    return float(calculator.get_accuracy(v, c)["mean_average_precision"])


def torchmetrics(vectors: np.ndarray, cliques: np.ndarray) -> float:
    """Its RetrievalMAP; not exact for cosine: relevant candidates with a score <= 0 are dropped."""
    from torchmetrics.functional.retrieval import retrieval_average_precision

    v, c = torch.from_numpy(vectors), torch.from_numpy(cliques)
    values = []
    for i in range(len(v)):
        scores = v @ v[i]
        keep = torch.arange(len(v)) != i
        relevant = (c == c[i])[keep]
        if relevant.any():
            values.append(float(retrieval_average_precision(scores[keep], relevant)))
    return float(np.mean(values))


def ranx(vectors: np.ndarray, cliques: np.ndarray) -> float:
    """Its MAP over runs of all candidates."""
    from ranx import Qrels, Run, evaluate

    names = [f"t{i:07d}" for i in range(len(vectors))]
    scores = vectors @ vectors.T
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        relevant = np.flatnonzero((cliques == cliques[i]) & (np.arange(len(vectors)) != i))
        if len(relevant):
            qrels[name] = {names[j]: 1 for j in relevant}
            run[name] = {
                other: s for other, s in zip(names, scores[i].tolist(), strict=True) if other != name
            }
    return float(evaluate(Qrels(qrels), Run(run), "map"))


RANX_UP_TO = 2000
"""Its dictionaries hold every pair: beyond, they take gigabytes and minutes."""

PEERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "full_argsort": full_argsort,
    "faiss_flat": faiss_flat,
    "pytorch_metric_learning": pytorch_metric_learning,
    "torchmetrics": torchmetrics,
    "ranx": ranx,
}
