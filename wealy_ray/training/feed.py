"""Steps read ahead by processes of their own, into memory that is used again and again.

Reading a crop that the kernel has at hand is one copy; into memory that was never used before it takes up to ten
times as long, since the kernel hands that out and clears it page by page. So there are a few slots, shared by the
training process and its loaders and, for a GPU, pinned: a loader reads crops into their places within a slot, and
nothing is copied again before the device.

A step's tensors lie in its slot: they are good until the next step is asked for.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from wealy_ray.errors import TransientError, WealyError
from wealy_ray.training.data import READERS, Batches, Step, carve
from wealy_ray.training.sampler import CliqueSampler

log = logging.getLogger(__name__)

AHEAD = 2
"""Steps that each loader has done or is at; one more is with the training."""


PORTABLE = 1
"""cudaHostRegisterPortable: pinned for whichever GPU this process uses."""


class Slot:
    """Memory that several processes share; it has no name, and goes with the last process that has it.

    Args:
        num_bytes: Its size; what is never written takes no memory.
    """

    def __init__(self, num_bytes: int) -> None:
        # not below /dev/shm, which is tiny in most containers
        self._fd = os.memfd_create("wealy-slot", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(1, num_bytes))
        self._map()

    def _map(self) -> None:
        self.memory = memoryview(mmap.mmap(self._fd, 0))

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._fd)

    def __setstate__(self, fd: Any) -> None:
        self._fd = fd.detach()
        self._map()

    def __del__(self) -> None:
        os.close(self._fd)

    def pin(self) -> bool:
        """Lets a GPU read it without a copy; False where that is refused."""
        return int(torch.cuda.cudart().cudaHostRegister(self._address(), len(self.memory), PORTABLE)) == 0

    def unpin(self) -> None:
        """The opposite."""
        torch.cuda.cudart().cudaHostUnregister(self._address())

    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Feed:
    """An iterator over steps.

    Args:
        batches: What steps are.
        first: Epoch and number of the first.
        stop: Epoch before which it ends.
        num_loaders: Processes that read; 0: this one does, when a step is asked for.
        pins: Whether a GPU takes the states.
    """

    def __init__(
        self, batches: Batches, first: tuple[int, int], stop: int, num_loaders: int, *, pins: bool
    ) -> None:
        self._batches = batches
        self._places = places(batches.sampler, first, stop)
        num_slots = AHEAD * num_loaders + 1
        self._slots = [Slot(batches.most_bytes) for _ in range(num_slots)]
        self._pinned = [slot for slot in self._slots if pins and slot.pin()]
        if pins and len(self._pinned) < num_slots:
            log.warning("memory for crops cannot be pinned: copies to the GPU will be slower")
        self._free = deque(range(num_slots))
        self._taken: int | None = None
        self._asked: deque[int] = deque()
        self._come: dict[int, tuple[int, Any]] = {}
        self._number = 0
        self._pool = None if num_loaders else ThreadPoolExecutor(READERS)
        self._loaders = [_Loader(batches, self._slots) for _ in range(num_loaders)]

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """The next step; the tensors of the one before are overwritten from now on.

        Raises:
            WealyError: What a loader met.
            TransientError: A loader was killed.
        """
        if self._pool is not None:
            return self._batches.read(next(self._places), self._slots[0].memory, self._pool)
        if self._taken is not None:
            self._free.append(self._taken)
            self._taken = None
        self._ask()
        if not self._asked:
            raise StopIteration
        number = self._asked.popleft()
        while number not in self._come:
            self._hear()
        self._taken, found = self._come.pop(number)
        if isinstance(found, WealyError):
            raise found
        step, shapes = found
        return replace(step, states=carve(self._slots[self._taken].memory, shapes))

    def close(self) -> None:
        """Ends the loaders; the tensors of the last step are no more to be used."""
        for loader in self._loaders:
            loader.end()
        if self._pool is not None:
            self._pool.shutdown()
        for slot in self._pinned:
            slot.unpin()
        self._loaders, self._pinned = [], []

    def __del__(self) -> None:
        if hasattr(self, "_loaders"):
            self.close()

    def _ask(self) -> None:
        """Gives every free slot to the loader that has least to do."""
        while self._free:
            place = next(self._places, None)
            if place is None:
                return
            loader = min(self._loaders, key=lambda loader: loader.waiting)
            loader.ask(self._number, place, self._free.popleft())
            self._asked.append(self._number)
            self._number += 1

    def _hear(self) -> None:
        """Waits until a loader has something to say."""
        pipes = {loader.pipe: loader for loader in self._loaders}
        for pipe in wait(list(pipes)):
            number, slot, found = pipes[pipe].hear()  # type: ignore[index]
            self._come[number] = slot, found


class _Loader:
    """A process that reads steps, as seen by the training."""

    def __init__(self, batches: Batches, slots: list[Slot]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.waiting = 0
        self._process = context.Process(target=_serve, args=(theirs, batches, slots), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, number: int, place: tuple[int, int], slot: int) -> None:
        self.waiting += 1
        try:
            self.pipe.send((number, place, slot))
        except OSError:
            self._mourn()

    def hear(self) -> tuple[int, int, Any]:
        try:
            data = self.pipe.recv_bytes()
        except (EOFError, OSError):
            self._mourn()
        self.waiting -= 1
        return pickle.loads(data)

    def end(self) -> None:
        self.pipe.close()
        self._process.kill()
        self._process.join()

    def _mourn(self) -> None:
        self._process.join()
        code = self._process.exitcode or 0
        if code >= 0:
            raise RuntimeError("a loader process failed; its traceback stands above")
        raise TransientError(
            f"a process that reads crops was killed by signal {-code}; if memory ran out, lower resources.loaders, "
            "then run the same command again"
        )


def _serve(pipe: Connection, batches: Batches, slots: list[Slot]) -> None:
    """What a loader does until the training's end of the pipe is closed, whatever closed it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training decides what an interruption means
    torch.set_num_threads(1)
    with ThreadPoolExecutor(READERS) as pool:
        while True:
            try:
                number, place, slot = pipe.recv()
            except (EOFError, ConnectionResetError):
                return
            found: Any
            try:
                step = batches.read(place, slots[slot].memory, pool)
                found = replace(step, states=[]), [tuple(x.shape) for x in step.states]
            except WealyError as e:
                found = e  # raised here it would become a page of text
            try:
                # the pipe's own way of sending tensors would open a file for each
                pipe.send_bytes(pickle.dumps((number, slot, found)))
            except (BrokenPipeError, ConnectionResetError):
                return


def places(sampler: CliqueSampler, first: tuple[int, int], stop: int) -> Iterator[tuple[int, int]]:
    """Epoch and number of all steps that are left, one epoch after the other."""
    epoch, step = first
    for number in range(epoch, stop):
        for place in range(step, sampler.steps(number)):
            yield number, place
        step = 0
