"""What a training has reached, in a few lines and for the run record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wealy_ray.progress import in_words
from wealy_ray.report.tables import two_columns
from wealy_ray.training.keeper import Pulse


@dataclass
class TrainSummary:
    """What a training has reached.

    Attributes:
        model: URI of the model directory.
        counts: Tracks, cliques and dropped tracks of both splits.
        epochs: Epochs that were trained, by all runs together.
        loss: Of the last epoch.
        best_map: Best validation MAP; -1 before the first.
        best_epoch: Where it was reached.
        parameters: Numbers that were trained.
        wall_s: Seconds of this run; 0: there was nothing left to do.
        pulse: The last one of this run.
    """

    model: str
    counts: dict[str, dict[str, int]]
    epochs: int = 0
    loss: float = float("nan")
    best_map: float = -1.0
    best_epoch: int = -1
    parameters: int = 0
    wall_s: float = 0.0
    pulse: Pulse | None = None

    def note(self, pulse: Pulse) -> None:
        """Takes in how far the training is."""
        self.pulse = pulse
        self.epochs, self.best_map, self.best_epoch = pulse.epoch, pulse.best_map, pulse.best_epoch

    def facts(self) -> dict[str, Any]:
        """For the run record."""
        pulse = self.pulse
        speed: dict[str, Any] = {}
        if pulse is not None:
            elapsed_s = max(pulse.elapsed_s, 1e-9)
            speed = {
                "workers": pulse.workers,
                "tracks_per_s": pulse.tracks / elapsed_s,
                "waited_share": pulse.waited_s / elapsed_s,
            }
        return {
            "wall_s": self.wall_s,
            "epochs": self.epochs,
            "best_map": self.best_map if self.best_epoch >= 0 else None,
            "best_epoch": self.best_epoch if self.best_epoch >= 0 else None,
            "parameters": self.parameters or None,
            **speed,
        }


def train_table(summary: TrainSummary) -> str:
    """For a terminal or a job log."""
    pulse = summary.pulse
    time = "nothing was left to do"
    if summary.wall_s and pulse is not None:
        elapsed_s = max(pulse.elapsed_s, 1e-9)
        time = (
            f"{in_words(summary.wall_s)}, {pulse.tracks / elapsed_s:.1f} tracks/s on {pulse.workers} worker"
            f"{'s' * (pulse.workers > 1)}, {pulse.waited_s / elapsed_s:.0%} waiting for data"
        )
    return two_columns(
        f"training finished: {summary.model}",
        [
            *(
                (split, f"{c['tracks']} tracks, {c['cliques']} cliques; {c['dropped']} tracks without states")
                for split, c in summary.counts.items()
            ),
            ("model", f"{summary.parameters:,} weights"),
            ("epochs", f"{summary.epochs}, loss {summary.loss:.4f} in the last"),
            ("best", f"validation MAP {summary.best_map:.4f} after epoch {summary.best_epoch}"),
            ("time", time),
        ],
    )
