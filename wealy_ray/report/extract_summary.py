"""What a run of extraction found and did."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from wealy_ray.report.tables import counts_in_words, two_columns
from wealy_ray.storage import Storage, join


@dataclass
class ExtractSummary:
    """What a run of extraction found and did.

    Attributes:
        root: `<store>/<extractor-id>`.
        tracks: Tracks of the manifest.
        ok, failed: Of them, after the run.
        done_before: Of them, finished by earlier runs.
        adopted: Of them, taken over from shards of a run that had died.
        states: Decoder states of the manifest's tracks.
        audio_s: Seconds of audio of the manifest's tracks.
        languages: Tracks by detected language.
        failures: Tracks by error type.
        wall_s: Seconds from start to end.
        work_s: Of them, seconds in which tracks were worked on (0: nothing was left to do).
        work_tracks: Tracks that this run worked on.
        work_audio_s: Seconds of audio that this run worked on.
        engine: What the run's engines counted, summed (see `sum_engines`).
    """

    root: str
    tracks: int
    ok: int = 0
    failed: int = 0
    done_before: int = 0
    adopted: int = 0
    states: int = 0
    audio_s: float = 0.0
    languages: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    wall_s: float = 0.0
    work_s: float = 0.0
    work_tracks: int = 0
    work_audio_s: float = 0.0
    engine: dict[str, float] = field(default_factory=dict)


def sum_engines(counters: Iterable[dict[str, float]]) -> dict[str, float]:
    """Sums what several engines counted (`EngineStats`), and adds `engines` and `slot_utilisation`."""
    totals: dict[str, float] = {"engines": 0}
    for one in counters:
        totals["engines"] += 1
        for name, count in one.items():
            totals[name] = totals.get(name, 0) + count
    if totals.get("slot_steps"):
        totals["slot_utilisation"] = round(totals["live_slot_steps"] / totals["slot_steps"], 4)
    return totals


def extraction_speed(storage: Storage, root: str) -> float | None:
    """Seconds of audio per second over all runs of a store that ended; None: none of them worked on a track."""
    work_s = audio_s = 0.0
    for info in storage.list(join(root, "runs")):
        if info.uri.endswith("/run.json"):
            record = json.loads(storage.read(info.uri))
            work_s += record.get("work_s") or 0.0
            audio_s += record.get("work_audio_s") or 0.0
    return audio_s / work_s if work_s else None


def extract_table(s: ExtractSummary) -> str:
    """What a run of extraction found and did."""
    left = s.tracks - s.ok - s.failed  # `retry-failed` leaves new tracks alone
    rest = f" + {left} not extracted yet" if left else ""
    speed = "nothing was left to do"
    if s.work_s:
        speed = f"{s.work_tracks / s.work_s:.2f} tracks/s, {s.work_audio_s / s.work_s:.1f} s of audio per s"
    return two_columns(
        f"extraction finished: {s.root}",
        [
            ("tracks", f"{s.tracks} = {s.ok} ok + {s.failed} failed{rest}"),
            ("failures", counts_in_words(s.failures)),
            ("states", f"{s.states:,} of {s.audio_s / 60:.1f} min of audio"),
            ("languages", counts_in_words(s.languages)),
            ("done before", f"{s.done_before} tracks" if s.done_before else ""),
            ("adopted", f"{s.adopted} tracks of a run that had died" if s.adopted else ""),
            ("speed", speed),
            ("engine", _engine_in_words(s.engine)),
            ("time", f"{s.wall_s:.1f} s, of which {s.work_s:.1f} s on tracks"),
        ],
    )


def _engine_in_words(engine: dict[str, float]) -> str:
    if "slot_utilisation" not in engine:
        return ""
    words = f"{engine['windows']:,.0f} windows, slots {engine['slot_utilisation']:.0%} busy"
    if engine["repetitions"]:
        words += f", {engine['repetitions']:,.0f} windows ended as they repeated themselves"
    if engine["backoffs"]:
        words += f", memory ran out {engine['backoffs']:.0f} times: lower engine.num_slots"
    return words
