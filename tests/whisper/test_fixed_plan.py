"""The `fixed` plan: order, one language per track, overlap of a track's windows, cancellation."""

from __future__ import annotations

import asyncio

import pytest
import torch
from whisper.model import Whisper

from tests.whisper.support import assert_same_bits, noise
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, decode_track, decode_tracks

OPTIONS = EngineOptions(device="cpu", num_slots=3)
SHORT = DecodeOptions(max_tokens=12)


def track(num_windows: int, seed: int) -> torch.Tensor:
    return torch.stack(noise(num_windows, seed)) if num_windows else torch.empty(0, 80, 3000)


def test_a_track_keeps_its_order_and_its_first_language(tiny: Whisper) -> None:
    mels = track(5, seed=1)
    with Engine(tiny, OPTIONS, SHORT) as engine:
        results = asyncio.run(decode_track(engine, mels))
        first = engine.submit(mels[0]).result()
        assert_same_bits(results[0], first)
        for mel, result in zip(mels[1:], results[1:], strict=True):
            forced = engine.submit(mel, first.language).result()
            assert result.tokens == forced.tokens
            assert (result.states == forced.states).all()
            assert result.language == first.language
            assert result.language_probability == first.language_probability


def test_later_windows_start_while_the_first_still_decodes(tiny: Whisper) -> None:
    with Engine(tiny, OPTIONS, DecodeOptions(max_tokens=100)) as engine:
        results = asyncio.run(decode_track(engine, track(3, seed=2)))
        steps = engine.stats().steps
    assert steps < 0.6 * sum(len(result.states) for result in results)


def test_tracks_share_the_engine_and_both_ways_agree(tiny: Whisper) -> None:
    tracks = [track(count, seed=count) for count in (3, 1, 0, 4)]

    async def all_tracks(engine: Engine) -> list[list[list[int]]]:
        decoded = await asyncio.gather(*(decode_track(engine, mels) for mels in tracks))
        return [[result.tokens for result in results] for results in decoded]

    with Engine(tiny, OPTIONS, SHORT) as engine:
        expected = asyncio.run(all_tracks(engine))
        found = [[result.tokens for result in results] for results in decode_tracks(engine, tracks)]
    assert found == expected
    assert [len(results) for results in found] == [3, 1, 0, 4]


def test_a_forced_language_needs_no_detection(tiny: Whisper) -> None:
    options = DecodeOptions(language="de", max_tokens=5)
    with Engine(tiny, OPTIONS, options) as engine:
        assert not engine.detects_language
        results = asyncio.run(decode_track(engine, track(2, seed=3)))
    assert [result.language for result in results] == ["de", "de"]


def test_a_cancelled_track_leaves_the_engine_working(tiny: Whisper) -> None:
    async def cancel_early(engine: Engine) -> None:
        task = asyncio.create_task(decode_track(engine, track(6, seed=4)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Engine(tiny, OPTIONS, SHORT) as engine:
        asyncio.run(cancel_early(engine))
        assert len(engine.submit(noise(1)[0]).result(timeout=60).tokens) == 12


def test_a_wrong_window_fails_its_track_only(tiny: Whisper) -> None:
    broken = track(3, seed=5)
    broken[2] = float("nan")
    with Engine(tiny, OPTIONS, SHORT) as engine:
        with pytest.raises(ValueError, match="not finite"):
            asyncio.run(decode_track(engine, broken))
        assert len(asyncio.run(decode_track(engine, track(2, seed=6)))) == 2
