"""How a CPU encoder can be run: in this process, or in worker processes.

Openai-whisper's encoder is what runs; variants differ in what surrounds it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.parts.workers import Worker, WorkerOptions


class Variant(Protocol):
    """One way to encode all windows."""

    compile_s: float | None
    """Seconds that compiling took; None where nothing is compiled."""

    def encode(self) -> None:
        """Encode them; the features are kept."""

    def features(self) -> list[np.ndarray]:
        """What was encoded last, [1500, d] per window."""

    def close(self) -> None:
        """Give back what it holds."""


class InProcess:
    """In this process.

    Args:
        encoder: The module.
        mels: All windows, in the dtype of its weights.
        threads: OpenMP threads of each Python thread.
        batch: Windows per call.
        python_threads: How many share the windows.
        context: Entered around the encoding.
        is_compiled: Whether the first call compiles.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mels: list[Tensor],
        *,
        threads: int,
        batch: int = 1,
        python_threads: int = 1,
        context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        is_compiled: bool = False,
    ):
        self.encoder, self.mels, self.batch = encoder, mels, batch
        self.threads, self.context = threads, context
        # The count of OpenMP threads belongs to the Python thread that sets it.
        self.pool = (
            ThreadPoolExecutor(python_threads, initializer=partial(torch.set_num_threads, threads))
            if python_threads > 1
            else None
        )
        self.encoded: list[Tensor] = []
        started = time.perf_counter()
        if is_compiled:
            self.encode()
        self.compile_s = time.perf_counter() - started if is_compiled else None

    def encode(self) -> None:
        """Encode them; the features are kept."""
        torch.set_num_threads(self.threads)
        starts = range(0, len(self.mels), self.batch)
        with self.context():
            batches = list((self.pool.map if self.pool else map)(self._batch, starts))
        self.encoded = [features for batch in batches for features in batch.unbind(0)]

    @torch.no_grad()
    def _batch(self, start: int) -> Tensor:
        return self.encoder(torch.stack(self.mels[start : start + self.batch]))

    def features(self) -> list[np.ndarray]:
        """What was encoded last, [1500, d] per window."""
        return [features.float().numpy() for features in self.encoded]

    def close(self) -> None:
        """End its threads."""
        if self.pool:
            self.pool.shutdown()


class InWorkers:
    """In processes of their own, which share the windows.

    Args:
        options: Of each worker.
        mels: All windows.
    """

    compile_s = None

    def __init__(self, options: list[WorkerOptions], mels: list[Tensor]):
        self.workers = [Worker(worker, [mel.numpy() for mel in mels]) for worker in options]
        self.shares = [range(start, len(mels), len(options)) for start in range(len(options))]

    def encode(self) -> None:
        """Encode them; the features stay in the workers, as they would with a decoder there."""
        for worker, share in zip(self.workers, self.shares, strict=True):
            worker.begin(share)
        for worker in self.workers:
            worker.wait()

    def features(self) -> list[np.ndarray]:
        """What was encoded last, [1500, d] per window."""
        by_window = {index: row for worker in self.workers for index, row in worker.features().items()}
        return [by_window[index] for index in sorted(by_window)]

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.close()
