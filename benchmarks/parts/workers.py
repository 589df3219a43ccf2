"""Processes that encode windows on demand, each with an environment, cores and threads of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
import torch

from benchmarks.parts.inputs import load


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker computes with."""

    weights: str | None
    shape: str
    threads: int
    cpus: frozenset[int] | None = None
    """The cores that it may use; None: all."""
    flush_denormal: bool = False
    """Set before any thread is made, which inherits it: in a process with running threads it reaches one."""
    environment: dict[str, str] = field(default_factory=dict)
    """OpenMP reads its settings when it is loaded: they must stand there before."""


class Worker:
    """A process of its own; it answers one request at a time.

    Args:
        options: What it computes with.
        mels: Log-mel windows that it is told to encode by index.
    """

    def __init__(self, options: WorkerOptions, mels: list[np.ndarray]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, options, mels), daemon=True)
        with environment(options.environment):
            self._process.start()
        theirs.close()
        self._pipe.recv()  # it is ready

    def begin(self, windows: Sequence[int]) -> None:
        """Let it encode these windows; `wait` for it."""
        self._pipe.send(list(windows))

    def wait(self) -> None:
        """Block until it has encoded what it began."""
        self._pipe.recv()

    def features(self) -> dict[int, np.ndarray]:
        """What it encoded last, by window."""
        self._pipe.send("features")
        return self._pipe.recv()

    def close(self) -> None:
        """End it."""
        self._pipe.send(None)
        self._process.join()


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Variables that are set inside, for processes that start there."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, options: WorkerOptions, mels: list[np.ndarray]) -> None:
    if options.cpus is not None:
        os.sched_setaffinity(0, options.cpus)
    if options.flush_denormal and not torch.set_flush_denormal(True):
        raise RuntimeError("this CPU cannot flush denormals")
    torch.set_num_threads(options.threads)
    encoder = load(options.weights, options.shape).model.encoder
    features: dict[int, np.ndarray] = {}
    pipe.send("ready")
    with torch.no_grad():
        while (request := pipe.recv()) is not None:
            if request == "features":
                pipe.send(features)
                continue
            features = {index: encoder(torch.from_numpy(mels[index])[None])[0].numpy() for index in request}
            pipe.send("done")
