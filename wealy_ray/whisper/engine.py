"""The engine: windows in, results out, one thread that keeps every decoder slot busy.

Requests wait in arrival order. Whenever a slot is free, waiting windows are encoded (at most one encoder
batch ahead of the slots, so memory does not grow with the queue) and put into slots; then all slots make one
step. A row that ends hands its result to the request's future and frees its slot before the next step.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import asdict, dataclass, field
from types import TracebackType

import torch
from torch import Tensor
from whisper.model import Whisper

from wealy_ray.errors import ConfigError
from wealy_ray.whisper.decoder import DecoderShape, RowReading, SlotDecoder
from wealy_ray.whisper.encoder import BatchEncoder
from wealy_ray.whisper.result import window_result
from wealy_ray.whisper.types import DecodeOptions, EngineOptions, EngineStats, Language, WindowResult
from wealy_ray.whisper.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class WindowFuture(Future[WindowResult]):
    """A window's result to come; `language` is known one decoder step after the window enters its slot."""

    def __init__(self) -> None:
        super().__init__()
        self.language: Future[Language] = Future()
        # Waiters may give up on it (asyncio cancels what it wraps), but only the engine completes it.
        self.language.set_running_or_notify_cancel()


@dataclass(eq=False)
class _Request:
    """A window on its way: its input, the tokens it starts from, and what it has sampled so far."""

    window: Tensor
    """Log-mel [M, N] or features [A, D]; dropped once it is in a slot."""
    initial: list[int]
    detect_language: bool
    max_tokens: int
    future: WindowFuture = field(default_factory=WindowFuture)
    position: int = 0
    sampled: list[int] = field(default_factory=list)

    @property
    def is_sampling(self) -> bool:
        """Whether the step at `position` samples."""
        return self.position >= len(self.initial) - 1

    def is_at_sot(self, vocabulary: Vocabulary) -> bool:
        """Whether the step at `position` feeds the start of transcript."""
        return self.position == self.initial.index(vocabulary.sot)

    def is_finished(self, vocabulary: Vocabulary) -> bool:
        """Whether the last sampled token ends the window."""
        if not self.sampled:
            return False
        return self.sampled[-1] == vocabulary.eot or len(self.sampled) == self.max_tokens


class Engine:
    """A continuous batcher over one Whisper model.

    Use it as a context manager, or call `start` and `close`. All torch work happens in one thread of its own.

    Args:
        model: A Whisper model, for example `load_whisper(source).model`; not modified.
        options: Device, dtype and batch shapes.
        decode: What is decoded.

    Raises:
        ConfigError: When the options do not fit the model or the machine.
    """

    def __init__(self, model: Whisper, options: EngineOptions, decode: DecodeOptions):
        self.options = options
        self.decode = decode
        self.device, self.dtype = _place(options)
        self.vocabulary = Vocabulary.of(model)
        if decode.language is not None:
            self.vocabulary.check_language(decode.language)
        limit = model.dims.n_text_ctx // 2
        if decode.max_tokens > limit:
            raise ConfigError(f"max_tokens is {decode.max_tokens}; this model allows at most {limit}")
        self._model = model
        self._mel_shape = (model.dims.n_mels, 2 * model.dims.n_audio_ctx)
        self._features_shape = (model.dims.n_audio_ctx, model.dims.n_audio_state)
        self._waiting: deque[_Request] = deque()
        self._encoded: deque[tuple[_Request, Tensor]] = deque()
        self._slots: list[_Request | None] = [None] * options.num_slots
        self._unfinished: set[_Request] = set()
        self._changed = threading.Condition()
        self._stopping: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._stats = EngineStats()
        self._num_threads = torch.get_num_threads()

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

    def submit(self, window: Tensor, language: str | None = None) -> WindowFuture:
        """Queue one window. Thread-safe.

        Args:
            window: Log-mel [n_mels, 3000], or the encoder's features [1500, d]. It must not be written to
                until the future is done.
            language: Forces a language on this window; None follows the engine's `DecodeOptions`.

        Returns:
            The result to come.

        Raises:
            ValueError: On another shape, or values that are not finite.
            ConfigError: On an unknown language.
            RuntimeError: When the engine is closed or has failed; the failure is its `__cause__`.
        """
        if tuple(window.shape) not in (self._mel_shape, self._features_shape):
            raise ValueError(
                f"a window has shape {list(self._mel_shape)} (log-mel) or {list(self._features_shape)} "
                f"(features), not {list(window.shape)}"
            )
        if not bool(torch.isfinite(window).all()):
            raise ValueError("the window holds values that are not finite")
        language = language or self.decode.language
        if language is not None:
            self.vocabulary.check_language(language)
        request = _Request(
            window=window,
            initial=self.vocabulary.start_sequence(
                language, task=self.decode.task, timestamps=self.decode.timestamps
            ),
            detect_language=language is None and bool(self.vocabulary.language_codes),
            max_tokens=self.decode.max_tokens,
        )
        with self._changed:
            if self._stopping is not None:
                raise RuntimeError(f"the engine takes no more windows: {self._stopping}") from self._stopping
            self._waiting.append(request)
            self._unfinished.add(request)
            self._changed.notify()
        return request.future

    def stats(self) -> EngineStats:
        """Counters since the engine was made."""
        return self._stats

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
            self._ready.set()

    def _serve(self) -> None:
        longest = self.vocabulary.start_sequence(
            None, task=self.decode.task, timestamps=self.decode.timestamps
        )
        shape = DecoderShape(self.options.num_slots, len(longest), self.decode.max_tokens)
        decoder = SlotDecoder(
            self._model,
            self.vocabulary,
            shape,
            timestamps=self.decode.timestamps,
            device=self.device,
            dtype=self.dtype,
        )
        batch = self.options.encoder_batch or (1 if self.device.type == "cpu" else 16)
        encoder = BatchEncoder(self._model, batch, device=self.device, dtype=self.dtype)
        self._ready.set()
        while self._wait_for_work():
            self._fill_slots(encoder, decoder)
            if any(self._slots):
                self._step(decoder)

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False when the engine is to stop."""
        with self._changed:
            while self._stopping is None and not (self._waiting or self._encoded or any(self._slots)):
                self._changed.wait()
            return self._stopping is None

    def _fill_slots(self, encoder: BatchEncoder, decoder: SlotDecoder) -> None:
        for slot, occupant in enumerate(self._slots):
            if occupant is not None:
                continue
            if not self._encoded:
                self._encode(encoder)
            if not self._encoded:
                return
            request, features_AD = self._encoded.popleft()
            started = time.perf_counter()
            decoder.fill(slot, features_AD, request.initial, detect_language=request.detect_language)
            self._slots[slot] = request
            self._count(decoder_s=time.perf_counter() - started)

    def _encode(self, encoder: BatchEncoder) -> None:
        """Encode the next batch of waiting windows; a window that comes with features passes through."""
        batch: list[_Request] = []
        with self._changed:
            while self._waiting and len(batch) < encoder.batch:
                request = self._waiting.popleft()
                if request.future.set_running_or_notify_cancel():
                    batch.append(request)
                else:
                    request.future.language.set_exception(CancelledError())
                    self._unfinished.discard(request)
        started = time.perf_counter()
        mels = [request.window for request in batch if tuple(request.window.shape) == self._mel_shape]
        encoded = iter(encoder.encode(mels) if mels else [])
        for request in batch:
            is_mel = tuple(request.window.shape) == self._mel_shape
            self._encoded.append((request, next(encoded) if is_mel else request.window))
            request.window = torch.empty(0)
        self._count(encoder_s=time.perf_counter() - started)

    def _step(self, decoder: SlotDecoder) -> None:
        started = time.perf_counter()
        live = [(slot, request) for slot, request in enumerate(self._slots) if request is not None]
        at_sot = [(slot, request) for slot, request in live if request.is_at_sot(self.vocabulary)]
        tokens = decoder.step(
            read_sot=bool(at_sot), sample=any(request.is_sampling for _, request in live)
        ).tolist()
        for slot, request in at_sot:
            reading = decoder.read(slot, 0)
            request.future.language.set_result(self._language(reading))
        num_finished = 0
        for slot, request in live:
            if request.is_sampling:
                request.sampled.append(tokens[slot])
            request.position += 1
            if request.is_finished(self.vocabulary):
                self._finish(decoder, slot, request)
                num_finished += 1
        self._count(
            windows=num_finished,
            steps=1,
            slot_steps=len(self._slots),
            live_slot_steps=len(live),
            decoder_s=time.perf_counter() - started,
        )

    def _finish(self, decoder: SlotDecoder, slot: int, request: _Request) -> None:
        reading = decoder.read(slot, request.position)
        decoder.release(slot)
        self._slots[slot] = None
        language = self._language(reading)
        result = window_result(self.vocabulary, request.initial, request.sampled, reading, language)
        with self._changed:
            self._unfinished.discard(request)
        request.future.set_result(result)

    def _language(self, reading: RowReading) -> Language:
        codes = self.vocabulary.language_codes
        if not codes:
            return Language("en", 1.0)
        return Language(codes[reading.language], reading.language_probability)

    def _count(self, **increments: float) -> None:
        counts = asdict(self._stats)
        self._stats = EngineStats(**{name: counts[name] + increments.get(name, 0) for name in counts})

    def _fail_unfinished(self) -> None:
        with self._changed:
            unfinished, reason = list(self._unfinished), self._stopping
            self._unfinished.clear()
            self._waiting.clear()
            self._encoded.clear()
            self._slots = [None] * len(self._slots)
        assert reason is not None
        for request in unfinished:
            for future in (request.future.language, request.future):
                # A waiter may have cancelled the future, and the language may be known already.
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(reason)


def _place(options: EngineOptions) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that `auto` stands for.

    Raises:
        ConfigError: When a GPU is asked for and torch sees none.
    """
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ConfigError("device is 'cuda', but torch sees no GPU; use device: auto or cpu")
    device = torch.device("cuda" if has_gpu and options.device != "cpu" else "cpu")
    if options.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.float16
    return device, getattr(torch, options.dtype)
