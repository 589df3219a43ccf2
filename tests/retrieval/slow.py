"""Retrieval by loops: what the kernel must equal."""

import numpy as np


def ranking(scores, own):
    """All columns but `own`, nearest first; of equal scores the lower column first."""
    columns = [j for j in range(len(scores)) if j != own]
    return sorted(columns, key=lambda j: (-scores[j], j))


def ranks(scores, own, relevant):
    order = ranking(scores, own)
    unscored = [j for j in relevant if scores[j] == -np.inf]
    if unscored:  # they stand behind everything that is not relevant
        order = [j for j in order if j not in unscored] + unscored
    return [i for i, j in enumerate(order, start=1) if j in relevant]


def extreme_ranks(scores, own, relevant, *, best):
    def key(j):
        favoured = (j in relevant) == best
        if scores[j] == -np.inf:
            favoured = j not in relevant
        return (-scores[j], not favoured)

    order = sorted((j for j in range(len(scores)) if j != own), key=key)
    return [i for i, j in enumerate(order, start=1) if j in relevant]


def average_precision(found):
    return sum(j / rank for j, rank in enumerate(found, start=1)) / len(found)


def nar(found, num_candidates):
    irrelevant = num_candidates - len(found)
    if irrelevant == 0:
        return 0.0
    above = [rank - j for j, rank in enumerate(found, start=1)]
    return 100 * sum(a / irrelevant for a in above) / len(found)
