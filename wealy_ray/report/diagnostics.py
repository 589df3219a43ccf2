"""Sentences about what looks wrong in an evaluation, each with its likely cause and what to check."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wealy_ray.report.network_diagnostics import Gain, about_networks

BASELINES = frozenset(
    (
        "random",
        "language",
        "oracle",
        "avg_embedding",
        "tfidf_words",
        "tfidf_characters",
        "more_like_this",
        "bm25",
        "sentence",
        "embeddings",
        "fusion",
    )
)
"""Kinds of systems that others are compared with; embeddings of a network that is known are none."""

MIN_AVG_EMBEDDING_GAIN = 2.0
"""MAP of mean states over chance; the paper's is a hundred times chance, so below this the states are suspect."""
MAX_LANGUAGE_SHARE = 0.8
MAX_COMPRESSION_RATIO = 2.4
"""zlib ratio above which Whisper itself takes a text for a repetition loop."""
MAX_REPETITIVE_SHARE = 0.05
MAX_TIE_GAP = 0.02
MAX_MISSING_SHARE = 0.01
MAX_FAILED_SHARE = 0.01
NO_SPEECH = 0.6
"""Probability above which Whisper takes a window for silent."""
MAX_NO_SPEECH_SHARE = 0.3
MIN_QUERIES = 100

System = Mapping[str, Any]

BOUNDS = frozenset(("random", "language", "oracle"))
"""Kinds that know no lyrics by design: what is odd in a system is natural in them."""


def main_system(systems: Sequence[System]) -> System | None:
    """The one to look at closely.

    The first system that is no baseline, Transformers before others; else the best that is more than a bound.
    """
    trained = [s for s in systems if not is_baseline(s)]
    if trained:
        return next(
            (s for s in trained if (s.get("facts") or {}).get("network") == "transformer"), trained[0]
        )
    real = [s for s in systems if s["kind"] not in BOUNDS]
    return max(real, key=lambda s: mean_of(s) or 0.0) if real else next(iter(systems), None)


def is_baseline(system: System) -> bool:
    """Whether others are compared with it."""
    return system["kind"] in BASELINES and not system.get("facts")


def mean_of(system: System | None, metric: str = "map", view: str = "all") -> float | None:
    """A system's mean of a metric; None where it has no such view."""
    summary = system["views"].get(view) if system else None
    return summary[metric]["mean"] if summary else None


def is_repetitive(text: str) -> bool:
    """Whether a transcript compresses so well that it is most likely a repetition loop."""
    data = text.encode()
    return len(data) > MAX_COMPRESSION_RATIO * len(zlib.compress(data))


def diagnose(
    metrics: Mapping[str, Any],
    chance: float | None = None,
    repetitive: float | None = None,
    gain: Gain = lambda *_: None,
) -> list[str]:
    """What looks wrong, most basic first; empty when nothing does.

    Args:
        metrics: The evaluation's `metrics.json`.
        chance: MAP of a random order over the same queries.
        repetitive: Share of transcripts for which `is_repetitive`.
        gain: MAP of the first named system less that of the second, with its interval (`map_gain`); None: not known.
    """
    return [
        *_about_extraction(metrics.get("extraction") or {}, repetitive),
        *_about_systems(metrics, chance),
        *about_networks(metrics["systems"], gain),
        *_about_fusion(metrics.get("fusion_curves") or []),
        *_about_tuning(metrics),
    ]


def _about_extraction(extraction: Mapping[str, Any], repetitive: float | None) -> Iterator[str]:
    tracks, failed = extraction.get("tracks") or 0, extraction.get("failed") or 0
    if failed > MAX_FAILED_SHARE * tracks:
        failures: dict[str, int] = extraction.get("failures") or {}
        most = f", most often as {max(failures, key=lambda name: failures[name])}" if failures else ""
        yield (
            f"{failed:,} of {tracks:,} tracks failed in extraction{most}: what is lost there is lost to every "
            "system; look at the failed rows before comparing MAPs."
        )
    windows = extraction.get("no_speech") or []
    silent = sum(p > NO_SPEECH for p in windows) / len(windows) if windows else 0.0
    if silent > MAX_NO_SPEECH_SHARE:
        yield (
            f"Whisper takes {silent:.0%} of the windows for silent (no-speech probability above {NO_SPEECH}): "
            "the collection holds many instrumentals, or the audio is damaged or decoded wrongly."
        )
    if repetitive is not None and repetitive > MAX_REPETITIVE_SHARE:
        yield (
            f"{repetitive:.0%} of the transcripts repeat themselves heavily (zlib ratio above "
            f"{MAX_COMPRESSION_RATIO}): Whisper most likely hallucinates there; listen to some, and check the "
            "decoding's fallback and no-speech settings. Some songs do repeat one line throughout."
        )


def _about_systems(metrics: Mapping[str, Any], chance: float | None) -> Iterator[str]:
    systems = metrics["systems"]
    of_kind = {s["kind"]: s for s in reversed(systems)}  # the first of each kind
    main = main_system(systems)
    ours, average = mean_of(main), mean_of(of_kind.get("avg_embedding"))
    if chance is None:
        chance = mean_of(of_kind.get("random"))
    if average is not None and chance and average < MIN_AVG_EMBEDDING_GAIN * chance:
        yield (
            f"The mean of the states reaches MAP {average:.3f}, less than {MIN_AVG_EMBEDDING_GAIN:g} times chance "
            f"({chance:.3f}): check the extraction (audio decoded wrongly, states of another layer, or "
            "track ids that do not belong to their cliques)."
        )
    if main is not None and ours is not None and not is_baseline(main):
        name, language = main["name"], mean_of(of_kind.get("language"))
        words = mean_of(of_kind.get("tfidf_words"))
        if language is not None and language >= MAX_LANGUAGE_SHARE * ours:
            yield (
                f"Knowing the language alone reaches MAP {language:.3f}, {name} {ours:.3f}: it has learned "
                "languages rather than lyrics; compare within one language."
            )
        if average is not None and ours <= average:
            yield (
                f"{name} (MAP {ours:.3f}) is no better than the mean of the same states ({average:.3f}): "
                "check that the checkpoint belongs to these states, and that training has converged."
            )
        if words is not None and ours < words:
            yield (
                f"TF-IDF on the transcripts (MAP {words:.3f}) finds more than {name} ({ours:.3f}); in the "
                "paper it is the other way round: check training data and checkpoint."
            )
    measured = [s for s in systems if s["kind"] not in BOUNDS]
    yield from _about_ties(measured)
    yield from _about_missing(measured, metrics["collection"].get("tracks") or 0)
    yield from _about_outdated(measured)
    queries = metrics["collection"].get("queries") or 0
    if 0 < queries < MIN_QUERIES:
        yield f"There are only {queries} queries: small differences between systems mean nothing here."


def _about_ties(systems: Sequence[System]) -> Iterator[str]:
    for system in systems:
        summary = system["views"].get("all")
        if summary and summary["map_optimistic"] - summary["map_pessimistic"] > MAX_TIE_GAP:
            yield (
                f"MAP of {system['name']} lies between {summary['map_pessimistic']:.3f} and "
                f"{summary['map_optimistic']:.3f}, depending on how ties are broken: many of its scores are equal "
                "(equal or empty transcripts, constant vectors, or too few digits)."
            )


def _about_missing(systems: Sequence[System], tracks: int) -> Iterator[str]:
    names: dict[int, list[str]] = {}
    for system in systems:
        missing = system.get("missing") or 0
        if missing > MAX_MISSING_SHARE * tracks:
            names.setdefault(missing, []).append(system["name"])
    for missing, known in names.items():
        some = ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
        know, its = ("knows", "its") if len(known) == 1 else ("know", "their")
        yield (
            f"{some} {know} nothing of {missing:,} of {tracks:,} tracks, which rank last: {its} figures are lower "
            "bounds."
        )


def _about_outdated(systems: Sequence[System]) -> Iterator[str]:
    for system in systems:
        if outdated := system.get("outdated") or 0:
            yield (
                f"{system['name']} has no vectors of the present states of {outdated:,} tracks: older vectors count, "
                "or none; run `wealy embed`, then evaluate again."
            )


def _about_fusion(curves: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for curve in curves:
        weights, chosen = sorted(curve["weights"]), curve.get("chosen")
        if len(weights) > 2 and chosen == weights[-1]:
            yield (
                f"The weight chosen for {curve['name']} is the largest one tried ({chosen:g}): try larger ones."
            )


def _about_tuning(metrics: Mapping[str, Any]) -> Iterator[str]:
    if metrics.get("tuned_on_test"):
        yield (
            "A fusion was tuned on tracks that it is reported on (tune_on_test): its figures are too good; name "
            "another tuning_split before they are compared with anything."
        )
