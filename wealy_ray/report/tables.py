"""Results as short plain-text tables for a terminal or a job log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wealy_ray.pipelines.extract import ExtractSummary


def two_columns(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A title and aligned name-value rows; rows without a value are left out."""
    kept = [(name, value) for name, value in rows if value]
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in kept)])


def counts_in_words(counts: dict[str, int]) -> str:
    """`en 9, es 7`; empty for no counts."""
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def extract_table(summary: ExtractSummary) -> str:
    """What a run of extraction found and did."""
    s = summary
    speed = "nothing was left to do"
    if s.work_s:
        worked = s.tracks - s.done_before - s.adopted
        speed = f"{worked / s.work_s:.2f} tracks/s, {s.work_audio_s / s.work_s:.1f} s of audio per s"
    return two_columns(
        f"extraction finished: {s.root}",
        [
            ("tracks", f"{s.tracks} = {s.ok} ok + {s.failed} failed"),
            ("failures", counts_in_words(s.failures)),
            ("states", f"{s.states:,} of {s.audio_s / 60:.1f} min of audio"),
            ("languages", counts_in_words(s.languages)),
            ("done before", f"{s.done_before} tracks" if s.done_before else ""),
            ("adopted", f"{s.adopted} tracks of a run that had died" if s.adopted else ""),
            ("speed", speed),
            ("time", f"{s.wall_s:.1f} s, of which {s.work_s:.1f} s on tracks"),
        ],
    )
