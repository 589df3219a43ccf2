"""The path of a GPU, exercised on the CPU: replayed steps, late looks, work ahead, memory that runs out."""

from __future__ import annotations

import logging
import weakref

import numpy as np
import pytest
import torch
from whisper.model import Whisper

from tests.whisper.support import GpuShaped, decode_all, noise, relative_l2, tiny_model, tiny_model_that_ends
from wealy_ray.whisper import (
    DecodeOptions,
    Engine,
    EngineOptions,
    ReferenceOptions,
    WindowResult,
    transcribe_tracks,
)
from wealy_ray.whisper.backend import is_out_of_memory
from wealy_ray.whisper.decoder import SlotDecoder
from wealy_ray.whisper.encoder import BatchEncoder

CPU = EngineOptions(device="cpu", num_slots=4)


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    return noise(14)


@pytest.fixture(scope="module")
def model(windows: list[torch.Tensor]) -> Whisper:
    return tiny_model_that_ends(windows)


def assert_equal_but_for_rounding(ours: WindowResult, other: WindowResult) -> None:
    assert ours.tokens == other.tokens
    assert ours.ended == other.ended
    assert ours.language == other.language
    assert ours.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-5)
    assert ours.no_speech_prob == pytest.approx(other.no_speech_prob, abs=1e-6)
    np.testing.assert_array_equal(ours.token_ids, other.token_ids)
    np.testing.assert_array_equal(ours.kinds, other.kinds)
    assert relative_l2(ours.states, other.states).max() < 2e-5


@pytest.mark.parametrize("timestamps", [False, True])
def test_replayed_steps_give_the_results_of_single_ones(
    model: Whisper, windows: list[torch.Tensor], timestamps: bool
) -> None:
    # 60 tokens are no multiple of the five steps per look: rows end between two looks, and at the limit.
    options = DecodeOptions(timestamps=timestamps, max_tokens=61)
    backend = GpuShaped()
    replayed = decode_all(model, windows, 4, options, backend)
    assert {"encoder", "decoder"} == set(backend.captured)
    for ours, other in zip(replayed, decode_all(model, windows, 4, options), strict=True):
        assert_equal_but_for_rounding(ours, other)


def test_windows_as_long_as_the_decoder_can_be(tiny: Whisper) -> None:
    # 224 prompt positions, 3 of the start, 222 sampled tokens of which 221 are fed: all 448 positions.
    prompt = list(range(100, 400))
    for backend in (None, GpuShaped()):
        with Engine(tiny, CPU, DecodeOptions(), backend=backend) as engine:
            futures = [engine.submit(window, prompt=prompt) for window in noise(5)]
            for future in futures:
                result = future.result(timeout=120)
                assert result.ended in ("max_tokens", "eot")
                assert len(result.states) <= 448
                assert len(result.states) == 227 + len(result.tokens) - (result.ended == "max_tokens")


def test_the_reference_plan_runs_on_replayed_steps(tiny: Whisper) -> None:
    generator = np.random.default_rng(1)
    songs = [generator.standard_normal(16_000 * length).astype(np.float32) / 9 for length in (70, 12, 45)]
    options = ReferenceOptions(temperatures=(0.0, 0.7), compression_ratio_threshold=None)
    found = []
    for backend in (None, GpuShaped()):
        with Engine(tiny, CPU, DecodeOptions(timestamps=True, max_tokens=40), backend=backend) as engine:
            found.append(transcribe_tracks(engine, songs, options))
    for ours, other in zip(*found, strict=True):
        assert ours.spans == other.spans
        assert {result.temperature for result in ours.results} == {0.7}
        assert [result.tokens for result in ours.results] == [result.tokens for result in other.results]


PLACES = [
    (SlotDecoder, "run", 9),
    (SlotDecoder, "fill", 6),
    (SlotDecoder, "read", 3),
    (BatchEncoder, "encode", 5),
]


@pytest.mark.parametrize(("owner", "method", "call"), PLACES, ids=[method for _, method, _ in PLACES])
@pytest.mark.parametrize("backend", [None, GpuShaped()], ids=["cpu", "gpu-shaped"])
def test_memory_that_runs_out_once_costs_no_window(
    model: Whisper,
    windows: list[torch.Tensor],
    backend: GpuShaped | None,
    owner: type,
    method: str,
    call: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = DecodeOptions(timestamps=False, max_tokens=30)
    expected = decode_all(model, windows, 4, options)
    original, calls = getattr(owner, method), iter(range(1000))

    def run_out(*arguments: object) -> object:
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore about it")
        return original(*arguments)

    monkeypatch.setattr(owner, method, run_out)
    with caplog.at_level(logging.WARNING), Engine(model, CPU, options, backend=backend) as engine:
        languages = [engine.detect_language(window) for window in windows[:2]]
        futures = [engine.submit(window) for window in windows]
        features = engine.encode(windows[0])
        results = [future.result(timeout=60) for future in futures]
        assert features.result(timeout=60).shape == (1500, 64)
        assert [future.result(timeout=60).code for future in languages] == [r.language for r in results[:2]]
        stats = engine.stats()
    for ours, other in zip(results, expected, strict=True):
        assert_equal_but_for_rounding(ours, other)
    assert (stats.backoffs, stats.windows) == (1, len(windows))
    assert "memory ran out with 4 slots (CUDA out of memory. Tried to allocate 2.00 GiB.)" in caplog.text
    assert "going on with 2 slots" in caplog.text


def test_memory_that_runs_out_twice_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(SlotDecoder, "run", run_out)
    with Engine(tiny_model(), CPU, DecodeOptions(max_tokens=5)) as engine:
        future = engine.submit(noise(1)[0])
        with pytest.raises(torch.OutOfMemoryError):
            future.result(timeout=60)
        assert engine.has_failed
        assert engine.stats().backoffs == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_every_way_of_saying_that_memory_is_gone_is_understood(error: Exception) -> None:
    later = RuntimeError("operation failed due to a previous error during capture")
    later.__context__ = error
    assert is_out_of_memory(error)
    assert is_out_of_memory(later)
    assert not is_out_of_memory(RuntimeError("an illegal memory access was encountered"))


def test_a_closed_engine_gives_its_memory_back(tiny: Whisper) -> None:
    engine = Engine(tiny, CPU, DecodeOptions(max_tokens=5)).start()
    assert engine.submit(noise(1)[0]).result(timeout=60).tokens
    caches = weakref.ref(engine._batcher.decoder)
    engine.close()
    assert caches() is None
    assert engine.stats().windows == 1
