"""The continuous batcher: requests -> encoder -> slots -> results, one turn at a time.

A turn fills the free slots with windows that are encoded, lets every slot feed its next tokens, encodes ahead
where the machine can do both at once, and takes out the rows that have ended; their slots are free in the next
turn. On a CPU a turn is one decoder step, on a GPU a few.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from whisper.model import Whisper

from wealy_ray.whisper.backend import Backend, Copy
from wealy_ray.whisper.decoder import SlotDecoder, Step
from wealy_ray.whisper.encoder import BatchEncoder
from wealy_ray.whisper.request import Decoding, Encoding, Request
from wealy_ray.whisper.result import window_result
from wealy_ray.whisper.types import DecodeOptions, EngineStats, Language
from wealy_ray.whisper.vocabulary import Vocabulary

Take = Callable[[int], list[Request]]
"""Hands over up to so many waiting requests, in order of arrival."""


@dataclass(frozen=True)
class _Encoded:
    """A window that waits for a slot; its features are there once the encoder's queue has passed `mark`."""

    request: Decoding
    features_AD: Tensor
    mark: torch.cuda.Event | None

    def is_ready(self) -> bool:
        return self.mark is None or self.mark.query()


@dataclass(frozen=True)
class _Ended:
    """A row that has ended, its contents on their way to the host."""

    request: Decoding
    row: Copy
    cut_at: int | None


class Batcher:
    """Encoder, decoder and the windows in them.

    Args:
        model: The Whisper model; not modified.
        vocabulary: Its token ids.
        decode: What is decoded.
        num_slots: Windows that decode at a time.
        encoder_batch: Windows per encoder call.
        backend: Where to compute.
        dtype: What to compute in.
    """

    def __init__(
        self,
        model: Whisper,
        vocabulary: Vocabulary,
        decode: DecodeOptions,
        *,
        num_slots: int,
        encoder_batch: int,
        backend: Backend,
        dtype: torch.dtype,
    ):
        self.vocabulary, self.backend = vocabulary, backend
        self.mel_shape = (model.dims.n_mels, 2 * model.dims.n_audio_ctx)
        self.stats = EngineStats()
        self.encoder = BatchEncoder(model, encoder_batch, backend=backend, dtype=dtype)
        self.decoder = SlotDecoder(model, vocabulary, decode, num_slots, backend=backend, dtype=dtype)
        self._taken: dict[Request, None] = {}
        """In order of arrival: everything that was taken and not handed out."""
        self._slots: list[Decoding | None] = [None] * num_slots
        self._encoded: deque[_Encoded] = deque()
        self._encodings: deque[tuple[Encoding, Tensor, torch.cuda.Event | None]] = deque()
        self._ended: deque[_Ended] = deque()
        self._flags: Copy = Copy([])
        self._tokens: Copy | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do for what was taken."""
        return not (any(self._slots) or self._encoded or self._encodings or self._ended)

    def turn(self, take: Take) -> None:
        """Fill slots, step, and hand out what has ended."""
        started_s, encoder_s = time.perf_counter(), self.stats.encoder_s
        self._fill_slots(take)
        if any(self._slots):
            self._run()
            self._encode_ahead(take)  # while a GPU is busy with the steps
            self._collect()
        self._deliver()
        encoder_s = self.stats.encoder_s - encoder_s
        self._count(decoder_s=time.perf_counter() - started_s - encoder_s)

    def unfinished(self) -> list[Request]:
        """Everything that was taken and not handed out, in order of arrival; it can be started anew."""
        return list(self._taken)

    def _fill_slots(self, take: Take) -> None:
        may_wait = not any(self._slots)  # live rows do not wait for the encoder
        for slot, occupant in enumerate(self._slots):
            if occupant is not None:
                continue
            while not self._encoded and self._encode(take):
                pass
            if not self._encoded or not (may_wait or self._encoded[0].is_ready()):
                return
            encoded = self._encoded.popleft()
            self._slots[slot] = encoded.request
            with self.backend.queue("decoder"):
                self.backend.wait_for(encoded.mark)
                self.backend.keep(encoded.features_AD)
                self.decoder.fill(slot, encoded.features_AD, encoded.request.start)
            encoded.request.begin()

    def _encode_ahead(self, take: Take) -> None:
        while len(self._encoded) < self.backend.batches_ahead * self.encoder.batch and self._encode(take):
            pass

    def _encode(self, take: Take) -> bool:
        """Encode the next batch of waiting windows; a window that comes with features passes through.

        Returns:
            Whether anything was waiting.
        """
        batch = take(self.encoder.batch)
        if not batch:
            return False
        self._taken.update(dict.fromkeys(batch))
        started_s = time.perf_counter()
        with self.backend.queue("encoder"):
            mels = [request.window for request in batch if tuple(request.window.shape) == self.mel_shape]
            features = iter(self.encoder.encode(mels) if mels else [])
            mark = self.backend.mark()
        for request in batch:
            is_mel = tuple(request.window.shape) == self.mel_shape
            features_AD = next(features) if is_mel else request.window
            if isinstance(request, Encoding):
                with self.backend.queue("encoder"):
                    # A copy: a part of the batch's tensor would keep all of it.
                    self._encodings.append((request, features_AD.clone(), self.backend.mark()))
            else:
                self._encoded.append(_Encoded(request, features_AD, mark if is_mel else None))
        self._count(encoder_s=time.perf_counter() - started_s)
        return True

    def _run(self) -> None:
        live = [request for request in self._slots if request is not None]
        step = Step(
            longest=max(request.position for request in live),
            read_sot=self.backend.is_static or any(request.position == request.start.sot for request in live),
            sample=self.backend.is_static or any(request.samples for request in live),
            draw=any(request.start.temperature > 0 for request in live),
        )
        with self.backend.queue("decoder"):
            self.decoder.run(step, self.backend.steps_per_read)
            self._flags = self.decoder.flags()
            guarded = any(request.max_repeats for request in live)
            self._tokens = self.backend.fetch([self.decoder.rows.tokens_BT]) if guarded else None

    def _collect(self) -> None:
        """See which rows have ended, and send their contents to the host."""
        (flags,) = self._flags.wait()
        tokens_BT = self._tokens.wait()[0] if self._tokens else None
        positions, live, languages, probabilities = flags.tolist()
        num_fed = num_sampled = num_cut = 0
        for slot, request in enumerate(self._slots):
            if request is None:
                continue
            before, request.position = request.position, int(positions[slot])
            num_fed += request.position - before
            num_initial = len(request.start.initial)
            num_sampled += max(request.position - max(before, num_initial - 1), 0)
            if not request.language.done():  # the first step after the start of transcript
                request.language.set_result(self._language(int(languages[slot]), probabilities[slot]))
            cut_at = None if tokens_BT is None else _repeats(request, tokens_BT[slot])
            if live[slot] and cut_at is None:
                continue
            num_cut += cut_at is not None
            self._slots[slot] = None
            if request.only_language:
                del self._taken[request]
                continue
            with self.backend.queue("decoder"):
                if live[slot]:
                    self.decoder.rows.stop(slot)
                self._ended.append(_Ended(request, self.decoder.read(slot, request.position), cut_at))
        steps = self.backend.steps_per_read
        self._count(
            tokens=num_sampled,
            steps=steps,
            slot_steps=steps * len(self._slots),
            live_slot_steps=num_fed,
            repetitions=num_cut,
        )

    def _deliver(self) -> None:
        """Hand out what has arrived; wait for it when there is nothing else to do."""
        blocks = not any(self._slots)
        while self._encodings and (blocks or self._encodings[0][2] is None or self._encodings[0][2].query()):
            encoding, features_AD, mark = self._encodings.popleft()
            if mark is not None:
                mark.synchronize()
            del self._taken[encoding]
            encoding.future.set_result(features_AD)
        while self._ended and (blocks or self._ended[0].row.is_ready()):
            ended = self._ended.popleft()
            request, language = ended.request, ended.request.language.result()
            result = window_result(
                self.vocabulary, request.start, ended.row.wait(), language, cut_at=ended.cut_at
            )
            self._count(windows=1)
            del self._taken[request]
            request.future.set_result(result)

    def _language(self, index: int, probability: float) -> Language:
        codes = self.vocabulary.language_codes
        return Language(codes[index], probability) if codes else Language("en", 1.0)

    def _count(self, **increments: float) -> None:
        counts = {name: getattr(self.stats, name) + more for name, more in increments.items()}
        self.stats = replace(self.stats, **counts)


def _repeats(request: Decoding, tokens_T: Tensor) -> int | None:
    begin = len(request.start.initial)
    return request.repeats_from(tokens_T[begin : request.position + 1].tolist())
