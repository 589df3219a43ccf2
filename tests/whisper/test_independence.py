"""A window's bits depend neither on its neighbours, nor on their order, nor on its slot."""

from __future__ import annotations

import random
import time

import pytest
import torch
from whisper.model import Whisper

from tests.whisper.support import assert_same_bits, decode_all, noise, tiny_model_that_ends
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, WindowResult


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


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("num_slots", [1, 3, 6, 16])
def test_shuffled_and_staggered_windows_keep_their_bits(
    model: Whisper, windows: list[torch.Tensor], num_slots: int, timestamps: bool
) -> None:
    options = DecodeOptions(timestamps=timestamps, max_tokens=50)
    expected = alone(model, windows, num_slots, options)
    draw = random.Random(num_slots)
    with Engine(model, EngineOptions(device="cpu", num_slots=num_slots), options) as engine:
        for _ in range(4):
            order = draw.sample(range(len(windows)), k=draw.randint(2, len(windows)))
            futures = []
            for index in order:
                futures.append(engine.submit(windows[index]))
                time.sleep(draw.choice([0.0, 0.0, 0.005]))
            for index, future in zip(order, futures, strict=True):
                assert_same_bits(future.result(), expected[index])


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
