"""Clock, medians, and how far two contenders agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks.parts.inputs import WINDOW_S
from benchmarks.peers import Decoded

SETTLE_S = 0.3  # the libraries' OpenMP threads spin for up to 0.2 s after their last work

Result = TypeVar("Result")


class Timings:
    """Seconds of every contender's rounds.

    Args:
        num_windows: What the seconds are divided by.
        device: On a GPU the clock waits for it, and the peak of allocated memory is noted.
    """

    def __init__(self, num_windows: float, device: torch.device):
        self.num_windows = num_windows
        self.on_gpu = device.type == "cuda"
        self.wall_s: dict[str, list[float]] = {}
        self.cpu_s: dict[str, list[float]] = {}
        self.resident_bytes: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}

    def run(self, name: str, work: Callable[[], Result]) -> Result:
        """Do the work and note its time: of the wall clock, and of this process's CPU."""
        time.sleep(SETTLE_S)
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.resident_bytes[name] = torch.cuda.memory_allocated()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        result = work()
        if self.on_gpu:
            torch.cuda.synchronize()
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), torch.cuda.max_memory_allocated())
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        self.wall_s.setdefault(name, []).append(wall_s / self.num_windows)
        self.cpu_s.setdefault(name, []).append(cpu_s / self.num_windows)
        return result

    def wall_median_s(self, name: str) -> float:
        """Median seconds per window of the wall clock."""
        return statistics.median(self.wall_s[name])

    def report(self) -> dict:
        """All of it for the JSON."""
        report = {"wall": summary(self.wall_s), "cpu": summary(self.cpu_s)}
        medians = report["wall"]["seconds_per_window"]
        report["audio_seconds_per_second"] = {name: WINDOW_S / taken for name, taken in medians.items()}
        if self.on_gpu:
            # All contenders' models and our slots stay allocated: what a contender needs is not the peak alone.
            report["torch_memory"] = {"resident_bytes": self.resident_bytes, "peak_bytes": self.peak_bytes}
        return report


def summary(seconds: dict[str, list[float]]) -> dict:
    """Medians, our speedup over every peer in every part, and the rounds."""
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    speedup = {}
    for name, median in medians.items():
        part, _, peer = name.partition("_")
        if peer != "ours":
            speedup[f"{part}_over_{peer}"] = median / medians[f"{part}_ours"]
    return {"seconds_per_window": medians, "speedup": speedup, "rounds": seconds}


def agreement(results: Decoded, reference: Decoded) -> dict:
    """How far a contender gives what the reference gives.

    Returns:
        The share of windows with equal tokens; over all windows the mean share of the reference's tokens
        before the first difference; and over the windows with equal tokens, where both have states, their
        relative L2 per row.
    """
    pairs = list(zip(results, reference, strict=True))
    equal = [(mine, theirs) for mine, theirs in pairs if mine[0] == theirs[0]]
    distances = [
        relative_l2(mine[1], theirs[1])
        for mine, theirs in equal
        if mine[1] is not None and theirs[1] is not None
    ]
    rows = np.concatenate(distances) if distances else np.zeros(0)
    return {
        "tokens_equal_share": len(equal) / len(pairs),
        "tokens_before_difference_share": statistics.mean(
            _common_share(mine[0], theirs[0]) for mine, theirs in pairs
        ),
        "states_relative_l2_max": float(rows.max()) if len(rows) else None,
        "states_relative_l2_median": float(np.median(rows)) if len(rows) else None,
        "states_relative_l2_above_2e-5_share": float((rows > 2e-5).mean()) if len(rows) else None,
        "states": len(rows),
    }


def relative_l2(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Per row, [n, d] against [n, d]."""
    values, reference = values.astype(np.float32), reference.astype(np.float32)
    return np.linalg.norm(values - reference, axis=-1) / np.linalg.norm(reference, axis=-1)


def _common_share(tokens: list[int], reference: list[int]) -> float:
    if not reference:
        return float(not tokens)
    pairs = zip(tokens, reference, strict=False)
    differing = (index for index, (mine, theirs) in enumerate(pairs) if mine != theirs)
    return next(differing, min(len(tokens), len(reference))) / len(reference)


def profile(work: Callable[[], object], path: Path) -> None:
    """Write torch.profiler's table of the kernels that take longest, those of the engine's thread included."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    averages = profiler.key_averages()
    path.write_text(averages.table(sort_by="self_device_time_total", row_limit=50, max_name_column_width=80))
