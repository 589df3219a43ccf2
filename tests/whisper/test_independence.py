"""A window's bits depend neither on its neighbours, nor on their order, nor on its slot."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from whisper.model import Whisper

from tests.whisper.support import assert_same_bits, decode_all, noise, tiny_model_that_ends
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, WindowFuture, WindowResult


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    return noise(12)


@pytest.fixture(scope="module")
def model(windows: list[torch.Tensor]) -> Whisper:
    return tiny_model_that_ends(windows)


def alone(
    model: Whisper, windows: list[torch.Tensor], num_slots: int, options: DecodeOptions
) -> list[WindowResult]:
    """Each window without a neighbour; freed slots are reused lowest first, so all sit in slot 0."""
    with Engine(model, EngineOptions(device="cpu", num_slots=num_slots), options) as engine:
        return [engine.submit(window).result() for window in windows]


@dataclass(frozen=True)
class Asked:
    """One window as it is submitted."""

    window: int
    language: str | None
    prompt: int
    temperature: float
    pause_ms: int


asked = st.builds(
    Asked,
    window=st.integers(0, 11),
    language=st.sampled_from([None, "en", "ja"]),
    prompt=st.sampled_from([0, 0, 1, 9, 223]),
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    pause_ms=st.sampled_from([0, 0, 0, 3]),
)


@pytest.mark.parametrize("timestamps", [False, True])
@given(num_slots=st.sampled_from([1, 3, 6, 16]), stream=st.lists(asked, min_size=2, max_size=14))
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
def test_order_neighbours_and_slots_change_no_bit(
    model: Whisper, windows: list[torch.Tensor], timestamps: bool, num_slots: int, stream: list[Asked]
) -> None:
    options = DecodeOptions(timestamps=timestamps, max_tokens=40)

    def submit(engine: Engine, one: Asked) -> WindowFuture:
        prompt = range(1000, 1000 + one.prompt)
        seed = one.window
        return engine.submit(
            windows[one.window], one.language, prompt=prompt, temperature=one.temperature, seed=seed
        )

    with Engine(model, EngineOptions(device="cpu", num_slots=num_slots), options) as engine:
        futures = []
        for one in stream:
            futures.append(submit(engine, one))
            time.sleep(one.pause_ms / 1000)
        together = [future.result(timeout=60) for future in futures]
        # Alone: without a neighbour; freed slots are reused lowest first, so all sit in slot 0.
        for one, result in zip(stream, together, strict=True):
            assert_same_bits(result, submit(engine, one).result(timeout=60))


def test_windows_end_at_different_lengths(model: Whisper, windows: list[torch.Tensor]) -> None:
    results = decode_all(model, windows, 3, DecodeOptions(timestamps=False, max_tokens=50))
    assert len({len(result.tokens) for result in results}) >= 4


def test_real_weights_keep_their_bits(base: Whisper, features: list[torch.Tensor]) -> None:
    options = DecodeOptions(timestamps=True, max_tokens=30)
    few = features[:6]
    expected = decode_all(base, few, 5, options)
    backwards = decode_all(base, [*noise_features(3), *reversed(few)], 5, options)
    for one, other in zip(expected, reversed(backwards[3:]), strict=True):
        assert_same_bits(one, other)


def noise_features(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1500, 512, generator=generator) for _ in range(count)]


def test_encoder_batches_keep_their_bits(model: Whisper, windows: list[torch.Tensor]) -> None:
    options = DecodeOptions(timestamps=False, max_tokens=10)
    batched = EngineOptions(device="cpu", num_slots=2, encoder_batch=3)
    expected = alone(model, windows[:5], 2, options)
    with Engine(model, batched, options) as engine:
        futures = [engine.submit(window) for window in reversed(windows[:5])]
        for future, one in zip(reversed(futures), expected, strict=True):
            assert_same_bits(future.result(), one)


def test_forced_language_is_the_same_as_detected(model: Whisper, windows: list[torch.Tensor]) -> None:
    with Engine(
        model, EngineOptions(device="cpu", num_slots=2), DecodeOptions(timestamps=False, max_tokens=10)
    ) as engine:
        for window in windows[:4]:
            detected = engine.submit(window).result()
            assert_same_bits(detected, engine.submit(window, detected.language).result())
