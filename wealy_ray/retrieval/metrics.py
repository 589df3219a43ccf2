"""Retrieval metrics from exact ranks.

Conventions:

- *Self-match*: a query is never its own candidate.
- *Cliques of one*, tracks without a clique: candidates, never queries.
- *Ties*: the earlier `track_id` stands above; optimistic and pessimistic MAP bound what other orders could give.
- *Duplicates*: an id that stands twice is refused.
- *Failed tracks and tracks without states*: counted; by the recipe's `without_states` they are dropped (neither query
  nor candidate, the default) or rank last. What one system alone knows nothing of (an empty transcript, say) always
  ranks last, behind everything that was scored, and a query without a score finds its versions behind all others.
- *Zero vectors*: cosine 0 with everything. *NaN or infinity*: refused, with the ids.
- *AP* over the full ranking; *P@10* divides by 10 always; *hit@k*: whether a relevant candidate is among the first k.
- *NAR*: 100 x mean over relevant candidates of (irrelevant ranked above / irrelevant); 0 without irrelevant ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.ranking import Ranks

PER_QUERY_SCHEMA = pa.schema(
    [
        ("track_id", pa.string()),
        ("clique_id", pa.string()),
        ("language", pa.string()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("clique_size", pa.int64()),
        ("view", pa.string()),
        ("num_relevant", pa.int64()),
        ("num_candidates", pa.int64()),
        ("ap", pa.float64()),
        ("ap_optimistic", pa.float64()),
        ("ap_pessimistic", pa.float64()),
        ("first_rank", pa.int64()),
        ("rr", pa.float64()),
        ("hit_1", pa.float64()),
        ("hit_10", pa.float64()),
        ("p_10", pa.float64()),
        ("nar", pa.float64()),
        ("ranks", pa.list_(pa.int64())),
    ]
)
"""One row per query and view; everything else can be recomputed from it."""

METRICS = {
    "map": "ap",
    "mr1": "first_rank",
    "mrr": "rr",
    "hit_1": "hit_1",
    "hit_10": "hit_10",
    "p_10": "p_10",
    "nar": "nar",
}
"""Metrics as they are called in a summary, and the column each is a mean of."""

CLIQUE_SIZES = ((2, 2), (3, 5), (6, 10), (11, 20), (21, None))
"""Clique sizes that are summarised together, first and last."""

NUM_RESAMPLES = 1000
"""Bootstrap resamples of cliques behind an interval."""


def per_query_table(
    collection: Collection, queries: np.ndarray, ranks: Ranks, num_candidates: np.ndarray, view: str
) -> pa.Table:
    """One row per query (`PER_QUERY_SCHEMA`).

    Args:
        collection: The tracks.
        queries: int64 [num_queries], tracks; each has at least one rank.
        ranks: Their ranks.
        num_candidates: int64 [num_queries], candidates that each query was ranked among, itself left out.
        view: `all`, `within_language` or `cross_language`.
    """
    sizes = np.diff(ranks.offsets)
    assert (sizes > 0).all(), "a query without a relevant candidate has no AP"
    first = ranks.offsets[:-1]
    number = np.arange(len(ranks.ranks)) - np.repeat(first, sizes) + 1  # j of the j-th relevant candidate

    def mean(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values.astype(np.float64), first) / sizes if len(first) else np.zeros(0)

    irrelevant = np.maximum(num_candidates - sizes, 1)
    first_rank = ranks.ranks[first]
    cliques = collection.cliques[queries]
    columns = {
        "track_id": collection.track_ids[queries],
        "clique_id": [collection.clique_names[c] for c in cliques],
        "language": collection.languages[queries],
        "kind": collection.kinds[queries],
        "split": collection.splits[queries],
        "clique_size": collection.clique_sizes[queries],
        "view": [view] * len(queries),
        "num_relevant": sizes,
        "num_candidates": num_candidates,
        "ap": mean(number / ranks.ranks),
        "ap_optimistic": mean(number / ranks.optimistic),
        "ap_pessimistic": mean(number / ranks.pessimistic),
        "first_rank": first_rank,
        "rr": 1.0 / first_rank,
        "hit_1": (first_rank <= 1).astype(np.float64),
        "hit_10": (first_rank <= 10).astype(np.float64),
        "p_10": mean(ranks.ranks <= 10) * sizes / 10,
        "nar": 100 * mean(ranks.ranks - number) / irrelevant,
        "ranks": pa.ListArray.from_arrays(ranks.offsets.astype(np.int32), ranks.ranks),
    }
    return pa.table(
        {f.name: pa.array(columns[f.name], f.type) for f in PER_QUERY_SCHEMA}, schema=PER_QUERY_SCHEMA
    )


def summarise(rows: pa.Table, seed: int = 0) -> dict[str, object]:
    """Means over queries with intervals.

    Two intervals stand beside each mean: `ci`, 1.96 sd / sqrt(n) as the literature prints it, and `low`, `high`, the
    2.5 and 97.5 % quantiles of a bootstrap over cliques, since versions of one clique are not independent.

    Args:
        rows: `PER_QUERY_SCHEMA`, one view, at least one row.
        seed: Of the bootstrap's draws.
    """
    num = rows.num_rows
    values = np.stack([rows[column].to_numpy().astype(np.float64) for column in METRICS.values()], axis=1)
    _, clique = np.unique(rows["clique_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    means = values.mean(axis=0)
    spread = 1.96 * values.std(axis=0, ddof=1) / np.sqrt(num) if num > 1 else np.zeros(len(METRICS))
    low, high = _clique_bootstrap(values, clique, seed)
    found: dict[str, object] = {"n": num}
    for i, name in enumerate(METRICS):
        found[name] = {
            "mean": float(means[i]),
            "ci": float(spread[i]),
            "low": float(low[i]),
            "high": float(high[i]),
        }
    found["map_optimistic"] = float(pc.mean(rows["ap_optimistic"]).as_py())
    found["map_pessimistic"] = float(pc.mean(rows["ap_pessimistic"]).as_py())
    return found


def map_gain(rows: pa.Table, others: pa.Table, seed: int = 0) -> tuple[float, float, float]:
    """MAP of one system less that of another, and the ends of its 95 % interval.

    The same queries are compared with themselves: systems that find the same ones easy are told apart although their
    own intervals overlap.

    Args:
        rows: Of the first system, one view; needs `track_id`, `clique_id` and `ap`.
        others: Of the second, over the same queries.
        seed: Of the bootstrap's draws, over cliques.
    """
    rows, others = rows.sort_by("track_id"), others.sort_by("track_id")
    assert rows["track_id"].equals(others["track_id"]), "both have ranked the same queries"
    gain = rows["ap"].to_numpy() - others["ap"].to_numpy()
    _, clique = np.unique(rows["clique_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    low, high = _clique_bootstrap(gain[:, None], clique, seed)
    return float(gain.mean()), float(low[0]), float(high[0])


def _clique_bootstrap(values: np.ndarray, clique: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of the mean when cliques are drawn with replacement; values [n, k], clique numbers [n]."""
    num_cliques = int(clique.max()) + 1
    counts = np.bincount(clique, minlength=num_cliques).astype(np.float64)
    sums = np.stack([np.bincount(clique, v, num_cliques) for v in values.T], axis=1)
    rng = np.random.default_rng(seed)
    means = np.empty((NUM_RESAMPLES, values.shape[1]))
    for i in range(NUM_RESAMPLES):
        drawn = np.bincount(rng.integers(0, num_cliques, num_cliques), minlength=num_cliques)
        means[i] = drawn @ sums / (drawn @ counts)
    return np.quantile(means, 0.025, axis=0), np.quantile(means, 0.975, axis=0)


def grouped(rows: pa.Table) -> dict[str, dict[str, dict[str, object]]]:
    """Summaries of the view `all` by language, kind, split and clique size; groups that are not named are left out."""
    rows = rows.filter(pc.equal(rows["view"], "all"))
    found: dict[str, dict[str, dict[str, object]]] = {}
    for column in ("language", "kind", "split"):
        names = sorted(name for name in pc.unique(rows[column]).to_pylist() if name)
        found[column] = {name: summarise(rows.filter(pc.equal(rows[column], name))) for name in names}
    found["clique_size"] = {}
    sizes = rows["clique_size"]
    for least, most in CLIQUE_SIZES:
        above = pc.greater_equal(sizes, least)
        chosen = rows.filter(above if most is None else pc.and_(above, pc.less_equal(sizes, most)))
        if chosen.num_rows:
            name = f"{least}+" if most is None else str(least) if least == most else f"{least}-{most}"
            found["clique_size"][name] = summarise(chosen)
    return found


def views_of(rows: pa.Table) -> dict[str, dict[str, object]]:
    """A summary of each view that has queries."""
    names = sorted(pc.unique(rows["view"]).to_pylist())
    return {name: summarise(rows.filter(pc.equal(rows["view"], name))) for name in names}


def mean_ap(tables: Iterable[pa.Table]) -> float:
    """MAP of the view `all` over tables of queries."""
    values = np.concatenate([t.filter(pc.equal(t["view"], "all"))["ap"].to_numpy() for t in tables])
    return float(values.mean())


def one_line(summary: Mapping[str, object]) -> str:
    """MAP with its interval, e.g. `.412 +- .035`."""
    ap = summary["map"]
    assert isinstance(ap, dict)
    return f"{ap['mean']:.3f} +- {ap['ci']:.3f}"
