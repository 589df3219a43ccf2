"""The report of an evaluation."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wealy_ray.errors import TRACK_ERROR_TYPES, ConfigError
from wealy_ray.report import diagnostics, figures
from wealy_ray.report.network_diagnostics import network_in_words
from wealy_ray.report.page import Drawing, write_page
from wealy_ray.retrieval.metrics import map_gain
from wealy_ray.storage import ObjectMissingError, Storage, join

MARKER = "metrics.json"
"""The file by which a folder is known for an evaluation's; written last."""
VIEW_TITLES = {
    "all": "All candidates",
    "within_language": "Candidates in the query's language",
    "cross_language": "Candidates in other languages",
}
METRIC_TITLES = {
    "map": "MAP",
    "mr1": "MR1",
    "mrr": "MRR",
    "hit_1": "hit@1",
    "hit_10": "hit@10",
    "p_10": "P@10",
    "nar": "NAR (%)",
}
DECIMALS = {"mr1": 1, "nar": 2}
"""Decimals of metrics that are no share of one; the others have three."""
GROUP_TITLES = {"clique_size": "clique size (versions)", "language": "language", "kind": "kind of version"}
MAX_GROUPS = 12
MAX_HARD_CLIQUES = 5
MAX_VERSIONS_SHOWN = 6
MAX_TRANSCRIPT_CHARS = 1500
PER_QUERY_COLUMNS = [
    "track_id",
    "clique_id",
    "language",
    "kind",
    "view",
    "num_candidates",
    "ap",
    "first_rank",
    "ranks",
]

DAMAGE = (pa.ArrowException, zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError)
"""What readers of Parquet and `.npz` raise over bytes that are not whole."""

PUBLISHED = (
    ("random", ".001", ".003", ".002"),
    ("TF-IDF on transcripts, cosine", ".272", ".503", ".537"),
    ("TF-IDF on transcripts, Lucene", ".242", ".457", ".486"),
    ("SBERT MiniLM on transcripts", ".294", ".508", ".573"),
    ("SBERT and trained transformer", "-", ".480", ".516"),
    ("Whisper-AvgEmb (mean of states)", ".166", ".297", ".322"),
    ("WEALY", ".328", ".640", ".692"),
    ("oracle (valid lyrics)", ".967", ".956", ".954"),
    ("CLEWS (melody, not lyrics)", ".774", ".876", "-"),
    ("WEALY + CLEWS", "-", ".912", "-"),
)
"""MAP as published, on DiscogsVI-YT, SHS100k-v2 and LyricCovers 2.0."""


@dataclass
class Transcripts:
    """What is kept of the transcripts: the texts to show and the share of repetitive ones."""

    texts: dict[str, str] = field(default_factory=dict)
    repetitive: float | None = None


def write_report(storage: Storage, run: str) -> str:
    """Writes `report.html` and `figures/*.png` into an evaluation's folder.

    Args:
        run: The evaluation's folder; needs `metrics.json` and the files of queries that it names. Without
            `sample.npz` or `transcripts.parquet` the page lacks what is drawn from them.

    Returns:
        The page's URI.

    Raises:
        ConfigError: The folder holds no evaluation, or not a whole one.
    """
    metrics = _read_metrics(storage, run)
    systems = metrics["systems"]
    queries = {s["name"]: _read_queries(storage, run, s["per_query"]) for s in systems if s.get("per_query")}
    main = diagnostics.main_system(systems)
    main_queries = queries.get(main["name"]) if main else None
    hardest = hardest_cliques(main_queries) if main_queries else []
    transcripts = _read_transcripts(storage, run, {v["track_id"] for c in hardest for v in c["versions"]})
    chance = expected_chance(main_queries) if main_queries else None

    sections = {
        "overview": list(_draw_overview(systems)),
        "groups": list(_draw_groups(systems)),
        "ranking": list(_draw_ranking(systems, queries)),
        "fusion": list(_draw_fusion(metrics.get("fusion_curves") or [])),
        "sample": list(_draw_sample(storage, run)),
        "extraction": list(_draw_extraction(metrics.get("extraction") or {})),
    }
    return write_page(
        storage,
        run,
        "evaluation.html.j2",
        title=metrics["title"],
        metrics=metrics,
        main=main,
        chance=chance,
        findings=diagnostics.diagnose(metrics, chance, transcripts.repetitive, partial(_gain, queries)),
        sections=sections,
        group_tables={g: _group_sizes(systems, g) for g in GROUP_TITLES},
        hardest=hardest,
        transcripts=transcripts,
        views=[(v, t) for v, t in VIEW_TITLES.items() if any(v in s["views"] for s in systems)],
        about_network=network_in_words,
        metric_titles=METRIC_TITLES,
        group_titles=GROUP_TITLES,
        decimals=DECIMALS,
        published=PUBLISHED,
        error_types=TRACK_ERROR_TYPES,
        max_systems=figures.MAX_SYSTEMS,
        max_chars=MAX_TRANSCRIPT_CHARS,
    )


def eleven_points(ranks: Sequence[np.ndarray] | pa.ListArray) -> np.ndarray:
    """Interpolated precision at the recalls 0, 0.1, ..., 1, mean over queries.

    Args:
        ranks: Per query the ranks of all its relevant candidates, from 1, ascending; none is empty.

    Returns:
        float64 [11].
    """
    array = ranks if isinstance(ranks, pa.ListArray) else pa.array([list(r) for r in ranks])
    sizes = pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = array.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    precision = (np.arange(len(flat)) - np.repeat(starts, sizes) + 1) / flat
    # the best precision from the first rank on that reaches the recall; the 0 behind serves `reduceat` as an end
    padded = np.append(precision, 0.0)
    points = []
    for tenth in range(11):
        needed = np.maximum((tenth * sizes + 9) // 10, 1)  # relevant candidates that recall tenth/10 takes
        spans = np.stack([starts + needed - 1, ends], axis=1).ravel()
        points.append(np.maximum.reduceat(padded, spans)[::2].mean())
    return np.array(points)


def expected_chance(rows: pa.Table) -> float:
    """MAP that random orders of the same queries' candidates have on average.

    With R of N candidates relevant, the expected AP is (H_N + (R - 1) / (N - 1) (N - H_N)) / N, H_N the harmonic
    number.
    """
    candidates = rows["num_candidates"].to_numpy().astype(np.float64)
    relevant = pc.list_value_length(rows["ranks"]).to_numpy().astype(np.float64)
    harmonic = np.cumsum(1 / np.arange(1, candidates.max() + 1))[candidates.astype(np.int64) - 1]
    density = (relevant - 1) / np.maximum(candidates - 1, 1)
    return float(np.mean((harmonic + density * (candidates - harmonic)) / candidates))


def hardest_cliques(rows: pa.Table) -> list[dict[str, Any]]:
    """The cliques of lowest mean AP, each with some of its queries, the worst first."""
    means = rows.group_by("clique_id").aggregate([("ap", "mean"), ("ap", "count")])
    worst = means.sort_by([("ap_mean", "ascending"), ("clique_id", "ascending")]).slice(0, MAX_HARD_CLIQUES)
    found = []
    for clique in worst.to_pylist():
        members = rows.filter(pc.equal(rows["clique_id"], clique["clique_id"]))
        members = members.sort_by([("ap", "ascending"), ("track_id", "ascending")])
        shown = members.slice(0, MAX_VERSIONS_SHOWN).drop_columns(["ranks"]).to_pylist()
        found.append(
            {"id": clique["clique_id"], "map": clique["ap_mean"], "n": clique["ap_count"], "versions": shown}
        )
    return found


def _read_metrics(storage: Storage, run: str) -> dict[str, Any]:
    uri = join(run, MARKER)
    try:
        found = json.loads(storage.read(uri))
    except ObjectMissingError as e:
        raise ConfigError(f"{run} holds no evaluation (no {MARKER}); run `wealy evaluate` first") from e
    except ValueError as e:
        raise ConfigError(f"{uri} is no JSON ({e}); run `wealy evaluate` again") from e
    if not isinstance(found, dict) or not {"title", "collection", "systems"} <= found.keys():
        raise ConfigError(f"{uri} is not the metrics of an evaluation; run `wealy evaluate` again")
    return found


def _read_queries(storage: Storage, run: str, name: str) -> pa.Table | None:
    """A system's queries in the view `all`; None when there are none."""
    uri = join(run, name)
    try:
        rows = pq.read_table(pa.BufferReader(storage.read(uri)), columns=PER_QUERY_COLUMNS)
    except ObjectMissingError as e:
        raise ConfigError(f"{uri} is missing, which metrics.json names; run `wealy evaluate` again") from e
    except DAMAGE as e:
        raise _damaged(uri) from e
    rows = rows.filter(pc.equal(rows["view"], "all"))
    return rows if rows.num_rows else None


def _read_transcripts(storage: Storage, run: str, wanted: set[str]) -> Transcripts:
    """Looks at all transcripts, batch by batch, and keeps the wanted ones."""
    found = Transcripts()
    uri = join(run, "transcripts.parquet")
    num, num_repetitive = 0, 0
    try:
        file = pq.ParquetFile(pa.BufferReader(storage.read(uri)))
        for batch in file.iter_batches(batch_size=4096, columns=["track_id", "text"]):
            for row in batch.to_pylist():
                text = row["text"] or ""
                num += 1
                num_repetitive += diagnostics.is_repetitive(text)
                if row["track_id"] in wanted:
                    found.texts[row["track_id"]] = text
    except ObjectMissingError:
        return found
    except DAMAGE as e:
        raise _damaged(uri) from e
    found.repetitive = num_repetitive / num if num else None
    return found


def _damaged(uri: str) -> ConfigError:
    return ConfigError(f"{uri} is damaged; run `wealy evaluate` again, which goes on from what it has ranked")


def _draw_overview(systems: Sequence[Mapping[str, Any]]) -> Iterator[Drawing]:
    spans = {s["name"]: _span(s["views"]["all"]) for s in systems if "all" in s["views"]}
    if spans:
        said = ", ".join(f"{name} {span[0]:.3f}" for name, span in spans.items())
        yield Drawing("map", "MAP of each system", f"MAP: {said}.", figures.map_overview(spans))


def _draw_groups(systems: Sequence[Mapping[str, Any]]) -> Iterator[Drawing]:
    for group, what in GROUP_TITLES.items():
        sizes = _group_sizes(systems, group)
        if sizes:
            spans = {
                s["name"]: {g: _span(of[g]) for g in sizes if g in of}
                for s in _drawn(systems)
                if (of := s["groups"].get(group))
            }
            if spans:
                alt = f"MAP of {len(spans)} systems by {what}: {', '.join(sizes)}. The table below has the numbers."
                yield Drawing(
                    f"map_by_{group}", f"MAP by {what}", alt, figures.map_by_group(spans, what, sizes)
                )


def _draw_ranking(
    systems: Sequence[Mapping[str, Any]], queries: Mapping[str, pa.Table | None]
) -> Iterator[Drawing]:
    rows = {s["name"]: r for s in _drawn(systems) if (r := queries.get(s["name"])) is not None}
    if not rows:
        return
    curves = {name: eleven_points(r["ranks"].combine_chunks()) for name, r in rows.items()}
    said = ", ".join(f"{name} {curve[5]:.3f}" for name, curve in curves.items())
    yield Drawing(
        "precision_recall",
        "Precision and recall, interpolated at 11 points",
        f"Precision at recall 0.5: {said}.",
        figures.precision_recall({name: list(curve) for name, curve in curves.items()}),
    )
    first = {name: r["first_rank"].to_numpy() for name, r in rows.items()}
    said = ", ".join(f"{name} {100 * np.mean(ranks == 1):.1f} %" for name, ranks in first.items())
    alt = f"Queries whose first hit has rank 1: {said}."
    yield Drawing("first_ranks", "Rank of the first hit", alt, figures.first_ranks(first))


def _draw_fusion(curves: Sequence[Mapping[str, Any]]) -> Iterator[Drawing]:
    curves = [c for c in curves if c["weights"]]
    if curves:
        said = ", ".join(f"{c['name']}: best MAP {max(c['map']):.3f}" for c in curves)
        yield Drawing("fusion", "MAP by fusion weight", f"{said}.", figures.fusion_curves(curves))


def _draw_sample(storage: Storage, run: str) -> Iterator[Drawing]:
    uri = join(run, "sample.npz")
    try:
        with np.load(io.BytesIO(storage.read(uri)), allow_pickle=False) as sample:
            similarity, cliques = sample["similarity"], [str(c) for c in sample["clique_ids"]]
            system = str(sample["system"])
    except ObjectMissingError:
        return
    except DAMAGE as e:
        raise _damaged(uri) from e
    if cliques:
        alt = f"Similarities of {len(cliques)} tracks of {len(set(cliques))} cliques, cliques along the diagonal."
        png = figures.similarity_matrix(similarity, cliques)
        yield Drawing("similarity", f"Similarity of a sample's tracks by {system}", alt, png)


def _draw_extraction(extraction: Mapping[str, Any]) -> Iterator[Drawing]:
    languages = extraction.get("languages")
    if languages:
        most = max(languages, key=languages.get)
        alt = f"Tracks by language; most are {most or 'unknown'} ({languages[most]:,})."
        png = figures.counts(languages, "tracks (number)")
        yield Drawing("languages", "Languages that Whisper detected", alt, png)
    states = extraction.get("states_per_track")
    if states:
        alt = f"Histogram of states per track, median {np.median(states):,.0f}."
        png = figures.histogram(states, "decoder states of a track (number)", "tracks (number)")
        yield Drawing("states", "States per track", alt, png)
    silent = extraction.get("no_speech")
    if silent:
        alt = f"Histogram of no-speech probabilities, median {np.median(silent):.2f}."
        png = figures.histogram(silent, "probability of no speech in a window", "windows (number)", (0, 1))
        yield Drawing("no_speech", "Windows without speech", alt, png)


def _drawn(systems: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The systems that crowded figures show: trained ones first, bounds last, in their own order otherwise."""

    def weight(system: Mapping[str, Any]) -> int:
        return 2 if system["kind"] in diagnostics.BOUNDS else int(diagnostics.is_baseline(system))

    return sorted(systems, key=weight)[: figures.MAX_SYSTEMS]


def _group_sizes(systems: Sequence[Mapping[str, Any]], group: str) -> dict[str, int]:
    """Groups and their queries: clique sizes ascending, others by number, the rarest left out."""
    sizes: dict[str, int] = {}
    for system in systems:
        for name, summary in (system["groups"].get(group) or {}).items():
            sizes[name] = max(sizes.get(name, 0), summary["n"])
    if group == "clique_size":
        return dict(sorted(sizes.items(), key=lambda item: int(item[0].rstrip("+").split("-")[0])))
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:MAX_GROUPS])


def _gain(queries: Mapping[str, pa.Table | None], name: str, other: str) -> figures.Span | None:
    rows, others = queries.get(name), queries.get(other)
    return map_gain(rows, others) if rows is not None and others is not None else None


def _span(summary: Mapping[str, Any]) -> figures.Span:
    found = summary["map"]
    return found["mean"], found["low"], found["high"]
