"""What a run of embedding found and did."""

from __future__ import annotations

from dataclasses import dataclass, field

from wealy_ray.report.tables import counts_in_words, two_columns


@dataclass
class EmbedSummary:
    """What a run of embedding found and did.

    Attributes:
        root: `<store>/<extractor-id>/embeddings/<embedder-id>`.
        tracks: Tracks of the states' index.
        ok, failed: Of them, after the run.
        done_before: Of them, embedded by earlier runs, of the states that count now.
        adopted: Of them, taken over from shards of a run that had died.
        vectors: Of all tracks.
        dim: Numbers of a vector.
        failures: Tracks by error type.
        release: Number of the release that these vectors are; 0: none.
        wall_s: Seconds from start to end.
        work_s: Of them, seconds in which tracks were worked on (0: nothing was left to do).
        work_tracks: Tracks that this run worked on.
        work_vectors: Vectors that this run computed.
    """

    root: str
    tracks: int
    ok: int = 0
    failed: int = 0
    done_before: int = 0
    adopted: int = 0
    vectors: int = 0
    dim: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    release: int = 0
    wall_s: float = 0.0
    work_s: float = 0.0
    work_tracks: int = 0
    work_vectors: int = 0


def embed_table(s: EmbedSummary) -> str:
    """For a terminal or a job log."""
    speed = "nothing was left to do"
    if s.work_s:
        speed = f"{s.work_tracks / s.work_s:.2f} tracks/s, {s.work_vectors / s.work_s:.1f} vectors/s"
    return two_columns(
        f"embedding finished: {s.root}",
        [
            ("tracks", f"{s.tracks} = {s.ok} ok + {s.failed} failed"),
            ("failures", counts_in_words(s.failures)),
            ("vectors", f"{s.vectors:,} of {s.dim} numbers"),
            ("done before", f"{s.done_before} tracks" if s.done_before else ""),
            ("adopted", f"{s.adopted} tracks of a run that had died" if s.adopted else ""),
            ("release", f"{s.release}: searches use these vectors from now on" if s.release else ""),
            ("speed", speed),
            ("time", f"{s.wall_s:.1f} s, of which {s.work_s:.1f} s on tracks"),
        ],
    )
