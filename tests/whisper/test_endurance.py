"""A long stream of windows: slots stay busy, memory stays flat."""

from __future__ import annotations

import gc
import statistics
from collections import deque
from collections.abc import Iterator

import psutil
import pytest
import torch

from tests.whisper.support import noise, tiny_model_that_ends
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, WindowFuture

IN_FLIGHT = 40


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What is done must be freed at once: a GPU's memory does not wait for the collector."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("num_windows", [1500, pytest.param(5000, marks=pytest.mark.heavy)])
def test_memory_is_flat_and_slots_are_busy(num_windows: int) -> None:
    windows = noise(12)
    model = tiny_model_that_ends(windows)
    with torch.no_grad():
        features = [model.encoder(window[None])[0] for window in windows]
    process, samples_mib = psutil.Process(), []
    waiting: deque[WindowFuture] = deque()
    options = DecodeOptions(timestamps=False, max_tokens=6)
    with Engine(model, EngineOptions(device="cpu", num_slots=16), options) as engine:
        for index in range(num_windows):
            # Every tenth window comes as log-mel: the encoder's memory is watched as well.
            window = windows[index % 12] if index % 10 == 0 else features[index % 12]
            waiting.append(engine.submit(window))
            if len(waiting) == IN_FLIGHT:
                assert waiting.popleft().result(timeout=60).tokens
            if index % 100 == 99:
                samples_mib.append(process.memory_full_info().uss / 2**20)
        for future in waiting:
            future.result(timeout=60)
        stats = engine.stats()
    assert stats.windows == num_windows
    assert stats.utilisation > 0.9
    tenth = len(samples_mib) // 10
    early, late = samples_mib[tenth : 3 * tenth], samples_mib[-2 * tenth :]
    assert (
        statistics.median(late) - statistics.median(early) < 8
    )  # MiB; over 5000 a leak of 2 KiB per window shows
