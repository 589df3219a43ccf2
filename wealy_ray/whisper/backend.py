"""Where the engine computes: one small interface over a CPU and a GPU.

On a CPU everything happens when it is called. On a GPU work is queued on two streams, one for the encoder and
one for the decoder, the decoder's steps are replayed as CUDA graphs, and the host looks at the results of
several steps at once. The engine's code is the same for both: it asks its backend for shapes and for the
operations below.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from wealy_ray.errors import ConfigError
from wealy_ray.whisper.types import EngineOptions

Lane = Literal["encoder", "decoder"]
"""Two queues of work that may overlap; within one, work runs in order."""

GPU_MEMORY_SHARE = 0.6
"""Of the free memory that the weights leave, what the slots may take; encoder, graphs and features need the rest."""


OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
"""What the errors of CUDA, its libraries and torch's CPU allocator say; only torch's CUDA allocator has a class."""


class Copy:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)

    def is_ready(self) -> bool:
        """Whether `wait` returns at once."""
        return True

    def wait(self) -> list[Tensor]:
        """The tensors, on the host, which nothing else writes to."""
        return self.tensors


class Backend:
    """The CPU: everything happens when it is called."""

    device = torch.device("cpu")
    is_static = False
    """Whether every step has the same shapes and flags, so that it can be captured once and replayed."""
    steps_per_read = 1
    """Decoder steps that are queued before the host looks which rows have ended."""
    batches_ahead = 0
    """Encoder batches that may wait for free slots. None on a CPU: encoder and decoder would share its cores."""
    row_multiple = 8
    """Rows of a decoder step are padded to a multiple of this (see `decoder`)."""
    encoder_batch = 1
    dtype = torch.float32
    packs = True
    """Whether linear maps are packed for oneDNN (see `linear`)."""

    def num_slots(self, bytes_per_slot: int, weights_bytes: int) -> int:  # noqa: ARG002 - a GPU asks for them
        """Slots to take when the recipe names no number: 16, where the gain of more has levelled off."""
        return 16

    def capture(self, work: Callable[[], None], lane: Lane) -> Callable[[], None]:  # noqa: ARG002
        """Something that does `work` again when it is called, on the same tensors."""
        return work

    @contextlib.contextmanager
    def queue(self, lane: Lane) -> Iterator[None]:  # noqa: ARG002
        """Queue what is called inside on `lane`."""
        yield

    def mark(self) -> torch.cuda.Event | None:
        """The present end of the current queue."""
        return None

    def wait_for(self, mark: torch.cuda.Event | None) -> None:
        """Let what is queued from now on start after `mark`."""

    def keep(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor of another queue until what is queued now has used it."""

    def upload(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of a host tensor on the device, or the tensor itself where it is there already."""
        return tensor.to(self.device, dtype or tensor.dtype)

    def fetch(self, tensors: Sequence[Tensor]) -> Copy:
        """Begin to copy tensors to the host."""
        return Copy([tensor.clone() for tensor in tensors])

    def synchronize(self) -> None:
        """Wait until everything that was queued is done."""

    def free_memory(self) -> None:
        """Give memory back after tensors were dropped."""
        gc.collect()


class _PinnedCopy(Copy):
    """Copies into pinned memory; ready when an event has passed."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__([torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors])
        for target, source in zip(self.tensors, tensors, strict=True):
            target.copy_(source, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    @override
    def is_ready(self) -> bool:
        return self._event.query()

    @override
    def wait(self) -> list[Tensor]:
        self._event.synchronize()
        return [tensor.clone() for tensor in self.tensors]  # pinned memory is scarce: it goes back at once


class CudaBackend(Backend):
    """A GPU: queues, graphs and pinned copies."""

    is_static = True
    steps_per_read = 8
    batches_ahead = 2
    row_multiple = 1
    encoder_batch = 16
    dtype = torch.float16
    packs = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        # The decoder goes first: it is short of parallel work, the encoder fills what it leaves.
        self._streams = {
            "encoder": torch.cuda.Stream(self.device, priority=0),
            "decoder": torch.cuda.Stream(self.device, priority=-1),
        }
        # Graphs of one lane never run at the same time and share their memory.
        self._pools = {lane: torch.cuda.graph_pool_handle() for lane in self._streams}

    @override
    def num_slots(self, bytes_per_slot: int, weights_bytes: int) -> int:
        """As many as fit into `GPU_MEMORY_SHARE` of what the weights leave, at most 256, in multiples of 8."""
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        fitting = int((free_bytes - weights_bytes) * GPU_MEMORY_SHARE) // bytes_per_slot
        return max(1, min(256, fitting // 8 * 8 or fitting))

    @override
    def capture(self, work: Callable[[], None], lane: Lane) -> Callable[[], None]:
        """Capture `work` as a CUDA graph; it must write to tensors that stay where they are."""
        stream = self._streams[lane]
        torch.cuda.synchronize(self.device)  # what it works on was made on another stream
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose and load their kernels outside the graph
                work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile (log-mel features).
        with torch.cuda.graph(
            graph, pool=self._pools[lane], stream=stream, capture_error_mode="thread_local"
        ):
            work()
        return graph.replay

    @override
    @contextlib.contextmanager
    def queue(self, lane: Lane) -> Iterator[None]:
        with torch.cuda.stream(self._streams[lane]):
            yield

    @override
    def mark(self) -> torch.cuda.Event | None:
        event = torch.cuda.Event()
        event.record()
        return event

    @override
    def wait_for(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)

    @override
    def keep(self, tensor: Tensor) -> None:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())

    @override
    def upload(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if not tensor.is_cuda:
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(
            dtype or tensor.dtype
        )  # cast there: it is faster, and a cast copy would not be pinned

    @override
    def fetch(self, tensors: Sequence[Tensor]) -> Copy:
        return _PinnedCopy(tensors)

    @override
    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    @override
    def free_memory(self) -> None:
        super().free_memory()
        torch.cuda.empty_cache()
        self._pools = {lane: torch.cuda.graph_pool_handle() for lane in self._streams}


def backend_for(options: EngineOptions) -> Backend:
    """The backend that `options.device` stands for.

    Raises:
        ConfigError: A GPU is asked for and torch sees none.
    """
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ConfigError("device is 'cuda', but torch sees no GPU; use device: auto or cpu")
    return CudaBackend() if has_gpu and options.device != "cpu" else Backend()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if any(words in str(error) for words in OUT_OF_MEMORY):
        return True
    # A graph that is being captured fails with an error of its own after that.
    return any(is_out_of_memory(former) for former in (error.__cause__, error.__context__) if former)
