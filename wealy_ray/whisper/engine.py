"""The engine: windows in, results out, one thread that keeps every decoder slot busy.

Requests wait in arrival order and are served by a `Batcher`, which runs in the engine's thread. When memory
runs out, the batcher is made anew at half its size, once, and everything unfinished starts again.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import fields, replace
from types import TracebackType

import torch
from torch import Tensor
from whisper.model import Whisper

from wealy_ray.errors import ConfigError
from wealy_ray.whisper.backend import Backend, backend_for, is_out_of_memory
from wealy_ray.whisper.batcher import Batcher
from wealy_ray.whisper.decoder import SlotDecoder
from wealy_ray.whisper.request import Decoding, Encoding, Request, WindowFuture
from wealy_ray.whisper.rows import RowStart
from wealy_ray.whisper.types import DecodeOptions, EngineOptions, EngineStats, Language
from wealy_ray.whisper.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

NUM_FEATURE_THREADS = 4
"""Tracks whose log-mel features are computed at the same time."""


class Engine:
    """A continuous batcher over one Whisper model.

    Use it as a context manager, or call `start` and `close`. All torch work happens in one thread of its own.

    Args:
        model: A Whisper model, for example `load_whisper(source).model`; not modified.
        options: Device, dtype and batch shapes.
        decode: What is decoded.
        backend: Where to compute; by default what `options.device` stands for.

    Raises:
        ConfigError: When the options do not fit the model or the machine.
    """

    def __init__(
        self, model: Whisper, options: EngineOptions, decode: DecodeOptions, *, backend: Backend | None = None
    ):
        self.options, self.decode = options, decode
        self.backend = backend or backend_for(options)
        self.dtype = self.backend.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        self.vocabulary = Vocabulary.of(model)
        self.dims = model.dims
        if decode.language is not None:
            self.vocabulary.check_language(decode.language)
        decode.state_block(model.dims.n_text_layer)
        limit = self.dims.n_text_ctx // 2
        if decode.max_tokens > limit:
            raise ConfigError(f"max_tokens is {decode.max_tokens}; this model allows at most {limit}")
        _warn_of_slow_bfloat16(self.device, self.dtype)
        self._model = model
        self._mel_shape = (model.dims.n_mels, 2 * model.dims.n_audio_ctx)
        self._features_shape = (model.dims.n_audio_ctx, model.dims.n_audio_state)
        self.prompt = (
            [] if decode.initial_prompt is None else self.vocabulary.prompt_tokens(decode.initial_prompt)
        )
        """Token ids of the initial prompt; empty without one."""
        self.feature_gate = threading.Semaphore(NUM_FEATURE_THREADS)
        """To be held while log-mel features are computed on `device`: they take memory there."""
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopping: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._batcher: Batcher | None = None
        self._former_stats = EngineStats()
        self.num_slots = options.num_slots or 0
        """Windows that decode at the same time; when the options leave it open, known once the engine is ready."""
        self._num_threads = torch.get_num_threads()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.backend.device

    @property
    def detects_language(self) -> bool:
        """Whether a window submitted without a language has it detected."""
        return self.decode.language is None and bool(self.vocabulary.language_codes)

    def start(self) -> Engine:
        """Start the thread; weights are prepared and caches allocated there."""
        assert self._thread is None, "the engine was started before"
        self._thread = threading.Thread(target=self._run, name="whisper-engine", daemon=True)
        self._thread.start()
        return self

    def wait_until_ready(self) -> None:
        """Block until weights are prepared and caches allocated.

        Raises:
            RuntimeError: When that failed; the failure is its `__cause__`.
        """
        self._ready.wait()
        if self._stopping is not None:
            raise RuntimeError(f"the engine cannot start: {self._stopping}") from self._stopping

    @property
    def has_failed(self) -> bool:
        """Whether its thread has ended with an error: it will never decode again."""
        return self._stopping is not None

    def close(self) -> None:
        """Stop after the current step; windows that are not finished fail with a RuntimeError."""
        self._stop(RuntimeError("the engine is closed"))
        if self._thread is not None:
            self._thread.join()
        self._fail_unfinished()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self,
        window: Tensor,
        language: str | None = None,
        *,
        prompt: Sequence[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> WindowFuture:
        """Queue one window. Thread-safe.

        Args:
            window: Log-mel [n_mels, 3000], or the encoder's features [1500, d]. It must not be written to
                until the future is done.
            language: Forces a language on this window; None follows the engine's `DecodeOptions`.
            prompt: Token ids of the context that comes before the start of transcript; the last 223 count, as
                in whisper (half of the decoder's positions - 1).
            temperature: Above 0, tokens are drawn; 0 takes the most probable one.
            seed: Of the draws: the same seed gives the same tokens, whatever the neighbours.

        Returns:
            The result to come.

        Raises:
            ValueError: On another shape, or values that are not finite.
            ConfigError: On an unknown language.
            RuntimeError: When the engine is closed or has failed; the failure is its `__cause__`.
        """
        language = language or self.decode.language
        if language is not None:
            self.vocabulary.check_language(language)
        sequence = self.vocabulary.start_sequence(
            language, task=self.decode.task, timestamps=self.decode.timestamps
        )
        context = self.vocabulary.context(prompt, at_most=self.dims.n_text_ctx // 2 - 1)
        initial = [*context, *sequence]
        # Whisper stops when the sequence outgrows the positions, its last token being one that is not fed.
        max_tokens = min(self.decode.max_tokens, self.dims.n_text_ctx + 1 - len(initial))
        start = RowStart(
            initial=initial,
            sot=len(context),
            end=len(initial) - 1 + max_tokens - 1,
            detect_language=language is None and bool(self.vocabulary.language_codes),
            temperature=temperature,
            seed=seed,
        )
        request = Decoding(self._checked(window), start, self.decode.max_repeats)
        self._enqueue(request)
        return request.future

    def encode(self, window: Tensor) -> Future[Tensor]:
        """Queue one window for the encoder alone, to submit its features more than once. Thread-safe.

        Args:
            window: Log-mel [n_mels, 3000], not to be written to until the future is done.

        Returns:
            Features [1500, d] on the engine's device, to come.

        Raises:
            ValueError, RuntimeError: As in `submit`.
        """
        if tuple(window.shape) != self._mel_shape:
            raise ValueError(f"log-mel has shape {list(self._mel_shape)}, not {list(window.shape)}")
        request = Encoding(self._checked(window))
        self._enqueue(request)
        return request.future

    def detect_language(self, window: Tensor) -> Future[Language]:
        """Queue one window for its language alone, asked without a prompt as whisper does. Thread-safe.

        Args:
            window: As in `submit`.

        Returns:
            The language to come; `en` on English-only models.

        Raises:
            ValueError, RuntimeError: As in `submit`.
        """
        sequence = self.vocabulary.start_sequence(None, task=self.decode.task, timestamps=True)[:2]
        start = RowStart(initial=sequence, sot=0, end=0, detect_language=bool(self.vocabulary.language_codes))
        request = Decoding(self._checked(window), start, only_language=True)
        self._enqueue(request)
        return request.language

    def stats(self) -> EngineStats:
        """Counters since the engine was made."""
        with self._changed:
            batcher, former = self._batcher, self._former_stats
            return former if batcher is None else _added(former, batcher.stats)

    def _checked(self, window: Tensor) -> Tensor:
        if tuple(window.shape) not in (self._mel_shape, self._features_shape):
            raise ValueError(
                f"a window has shape {list(self._mel_shape)} (log-mel) or {list(self._features_shape)} "
                f"(features), not {list(window.shape)}"
            )
        if not bool(torch.isfinite(window).all()):
            raise ValueError("the window holds values that are not finite")
        return window

    def _enqueue(self, request: Request) -> None:
        with self._changed:
            if self._stopping is not None:
                raise RuntimeError(f"the engine takes no more windows: {self._stopping}") from self._stopping
            self._waiting.append(request)
            self._changed.notify()

    # Everything below runs in the engine's thread, except `_stop`.

    def _stop(self, reason: BaseException) -> None:
        with self._changed:
            if self._stopping is None:
                self._stopping = reason
            self._changed.notify()

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)  # the OpenMP count belongs to the thread
            with torch.inference_mode():
                self._serve()
        except BaseException as error:
            logger.exception("the Whisper engine failed")
            self._stop(error)
        finally:
            self._fail_unfinished()
            self._drop_batcher()
            self._ready.set()

    def _serve(self) -> None:
        num_slots = self.options.num_slots or self.backend.num_slots(
            SlotDecoder.bytes_per_slot(self._model, self.dtype),
            sum(parameter.numel() for parameter in self._model.parameters()) * self.dtype.itemsize,
        )
        encoder_batch = self.options.encoder_batch or self.backend.encoder_batch
        if self._serve_with(num_slots, encoder_batch, may_back_off=num_slots > 1):
            return
        self._back_off(num_slots // 2)
        self._serve_with(num_slots // 2, max(1, encoder_batch // 2), may_back_off=False)

    def _serve_with(self, num_slots: int, encoder_batch: int, *, may_back_off: bool) -> bool:
        """Serve until the engine is to stop; False when memory ran out before that."""
        try:
            batcher = Batcher(
                self._model,
                self.vocabulary,
                self.decode,
                num_slots=num_slots,
                encoder_batch=encoder_batch,
                backend=self.backend,
                dtype=self.dtype,
            )
            with self._changed:
                self._batcher, self.num_slots = batcher, num_slots
            self._ready.set()
            while self._wait_for_work(batcher):
                batcher.turn(self._take)
        except (RuntimeError, MemoryError) as error:
            if not (may_back_off and is_out_of_memory(error)):
                raise
            logger.warning("memory ran out with %d slots (%s)", num_slots, str(error).splitlines()[0])
            return False
        return True

    def _back_off(self, num_slots: int) -> None:
        """Put back what was unfinished, in order, and give the memory back."""
        with self._changed:
            if self._batcher is not None:
                self._waiting.extendleft(reversed(self._batcher.unfinished()))
            waiting = len(self._waiting)
        self._drop_batcher()
        with self._changed:
            self._former_stats = replace(self._former_stats, backoffs=self._former_stats.backoffs + 1)
        logger.warning("going on with %d slots; %d windows start again or wait", num_slots, waiting)

    def _drop_batcher(self) -> None:
        self.backend.synchronize()  # nothing may be writing to what is given back
        with self._changed:
            if self._batcher is not None:
                self._former_stats = _added(self._former_stats, self._batcher.stats)
            self._batcher = None
        self.backend.free_memory()

    def _wait_for_work(self, batcher: Batcher) -> bool:
        """Block until there is something to do; False when the engine is to stop."""
        with self._changed:
            while self._stopping is None and not self._waiting and batcher.is_idle:
                self._changed.wait()
            return self._stopping is None

    def _take(self, count: int) -> list[Request]:
        """Up to `count` waiting requests, without those that were cancelled."""
        taken: list[Request] = []
        cancelled: list[Request] = []
        with self._changed:
            while self._waiting and len(taken) < count:
                request = self._waiting.popleft()
                is_wanted = request.future.running() or request.future.set_running_or_notify_cancel()
                (taken if is_wanted else cancelled).append(request)
        for request in cancelled:
            request.fail(CancelledError())
        return taken

    def _fail_unfinished(self) -> None:
        with self._changed:
            unfinished = [*(self._batcher.unfinished() if self._batcher else []), *self._waiting]
            self._waiting.clear()
            reason = self._stopping
        assert reason is not None
        for request in unfinished:
            request.fail(reason)


def _added(one: EngineStats, other: EngineStats) -> EngineStats:
    return EngineStats(**{f.name: getattr(one, f.name) + getattr(other, f.name) for f in fields(EngineStats)})


def _warn_of_slow_bfloat16(device: torch.device, dtype: torch.dtype) -> None:
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.9
    if device.type == "cpu" and dtype == torch.bfloat16 and capabilities.get("avx512_bf16") is False:
        logger.warning("this CPU has no bfloat16 instructions; dtype: float32 is faster here")
