"""The engine as a service: failures, closing, cancelling, cuts, refusals, English-only models."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from whisper.model import Whisper

from tests.whisper.support import ENGLISH_TINY_DIMS, decode_all, noise, stock, tiny_model
from wealy_ray.errors import ConfigError
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, Kind

CPU = EngineOptions(device="cpu", num_slots=2)
SHORT = DecodeOptions(max_tokens=8)


class BoomError(Exception):
    pass


def explode_at_encoder_call(model: Whisper, call: int) -> None:
    """Make the encoder raise at its n-th call from now."""
    calls = iter(range(1, 1_000_000))

    def hook(_module: torch.nn.Module, _args: tuple[torch.Tensor, ...]) -> None:
        if next(calls) == call:
            raise BoomError("boom")

    model.encoder.register_forward_pre_hook(hook)


def test_a_failure_fails_every_pending_window_and_later_submits() -> None:
    model = tiny_model()
    explode_at_encoder_call(model, 4)
    with Engine(model, CPU, SHORT) as engine:
        futures = [engine.submit(window) for window in noise(8)]
        assert len(futures[0].result(timeout=60).tokens) == 8
        for future in futures[3:]:
            with pytest.raises(BoomError, match="boom"):
                future.result(timeout=60)
            with pytest.raises(BoomError):
                future.language.result(timeout=60)
        with pytest.raises(RuntimeError, match="boom") as caught:
            engine.submit(noise(1)[0])
        assert isinstance(caught.value.__cause__, BoomError)


def test_closing_fails_unfinished_windows_and_never_hangs(tiny: Whisper) -> None:
    engine = Engine(tiny, CPU, DecodeOptions()).start()
    futures = [engine.submit(window) for window in noise(20)]
    futures[0].language.result(timeout=60)
    engine.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        futures[-1].result()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(noise(1)[0])
    engine.close()


def test_a_cancelled_window_costs_its_neighbours_nothing(tiny: Whisper) -> None:
    with Engine(tiny, CPU, SHORT) as engine:
        futures = [engine.submit(window) for window in noise(8)]
        cancelled = futures[-1].cancel()
        results = [future.result(timeout=60) for future in futures[:-1]]
        assert cancelled
        assert len(results) == 7
        assert futures[-1].cancelled()


def test_who_waits_for_the_language_of_a_cancelled_window_is_told(tiny: Whisper) -> None:
    engine = Engine(tiny, CPU, SHORT)  # not started: the window waits
    future = engine.submit(noise(1)[0])
    assert future.cancel()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        future.language.result(timeout=10)


def test_many_threads_submit_at_once(tiny: Whisper) -> None:
    windows = noise(12)
    expected = decode_all(tiny, windows, 2, SHORT)
    tokens: dict[int, list[int]] = {}
    with Engine(tiny, CPU, SHORT) as engine:

        def work(index: int) -> None:
            tokens[index] = engine.submit(windows[index]).result(timeout=60).tokens

        threads = [threading.Thread(target=work, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [tokens[index] for index in range(12)] == [result.tokens for result in expected]


def test_language_is_known_before_the_window_is_done(tiny: Whisper) -> None:
    with Engine(tiny, CPU, DecodeOptions()) as engine:
        future = engine.submit(noise(1)[0])
        language = future.language.result(timeout=60)
        assert not future.done()
        result = future.result(timeout=60)
    assert (result.language, result.language_probability) == (language.code, language.probability)


def test_a_cut_window_has_no_eot_state(tiny: Whisper) -> None:
    (result,) = decode_all(tiny, noise(1), 2, DecodeOptions(timestamps=False, max_tokens=5))
    assert len(result.tokens) == 5
    assert len(result.states) == 4 + 5 - 1
    assert Kind.EOT not in result.kinds
    assert list(result.kinds) == [Kind.SOT] * 3 + [Kind.TEXT] * 5
    assert list(result.token_ids[3:]) == result.tokens


def test_timestamps_are_labelled(tiny: Whisper) -> None:
    (result,) = decode_all(tiny, noise(1), 2, DecodeOptions(timestamps=True, max_tokens=20))
    is_timestamp = result.token_ids >= 50364
    assert is_timestamp.any()
    np.testing.assert_array_equal(result.kinds == Kind.TIMESTAMP, is_timestamp)


@pytest.mark.parametrize("timestamps", [False, True])
def test_english_only_models_have_no_language_to_detect(timestamps: bool) -> None:
    model = tiny_model(ENGLISH_TINY_DIMS)
    options = DecodeOptions(timestamps=timestamps, max_tokens=30)
    windows = noise(3)
    for ours, window in zip(decode_all(model, windows, 3, options), windows, strict=True):
        reference = stock(model, window, timestamps=timestamps, max_tokens=30)
        assert ours.tokens == reference.result.tokens
        assert (ours.language, ours.language_probability) == ("en", 1.0)
        assert ours.no_speech_prob == pytest.approx(reference.result.no_speech_prob, rel=1e-3)
        assert ours.states.shape == reference.states.shape
    with (
        Engine(model, CPU, options) as engine,
        pytest.raises(ConfigError, match=r"'de' is unknown .* valid are en"),
    ):
        engine.submit(windows[0], "de")


def test_translation_starts_with_its_own_token(tiny: Whisper) -> None:
    (result,) = decode_all(tiny, noise(1), 1, DecodeOptions(language="it", task="translate", max_tokens=3))
    assert list(result.token_ids[:2]) == [50258, 50274]
    assert result.language == "it"
    assert 0 < result.language_probability < 1


def test_what_cannot_be_decoded_is_refused_at_once(tiny: Whisper) -> None:
    with pytest.raises(ConfigError, match="max_tokens is 225; this model allows at most 224"):
        Engine(tiny, CPU, DecodeOptions(max_tokens=225))
    with pytest.raises(ConfigError, match="'klingon' is unknown"):
        Engine(tiny, CPU, DecodeOptions(language="klingon"))
    for wrong in ({"device": "tpu"}, {"dtype": "int8"}, {"num_slots": 0}, {"encoder_batch": 0}):
        with pytest.raises(ConfigError):
            EngineOptions(**wrong)
    with Engine(tiny, CPU, SHORT) as engine:
        with pytest.raises(ValueError, match=r"\[80, 3000\]"):
            engine.submit(torch.zeros(80, 2999))
        with pytest.raises(ValueError, match="not finite"):
            engine.submit(torch.full((80, 3000), float("nan")))
        assert engine.submit(torch.zeros(80, 3000)).result(timeout=60).tokens


def test_bfloat16_runs(tiny: Whisper) -> None:
    options = EngineOptions(device="cpu", dtype="bfloat16", num_slots=2, encoder_batch=2)
    with Engine(tiny, options, SHORT) as engine:
        result = engine.submit(noise(1)[0]).result(timeout=60)
    assert result.states.dtype == np.float32
    assert np.isfinite(result.states).all()


def test_ready_means_that_caches_are_allocated(tiny: Whisper) -> None:
    engine = Engine(tiny, CPU, SHORT).start()
    engine.wait_until_ready()
    assert not engine.has_failed
    engine.close()


def test_an_engine_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("no room for the caches")

    engine = Engine(tiny_model(), CPU, SHORT)
    monkeypatch.setattr(torch, "zeros", no_memory)  # the caches are made with it, in the engine's thread
    with pytest.raises(RuntimeError, match="the engine cannot start: no room for the caches"):
        engine.start().wait_until_ready()
    assert engine.has_failed
    engine.close()
