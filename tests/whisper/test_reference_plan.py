"""The `reference` plan against `whisper.transcribe`: whole songs, states of a hooked run, fallback, edges."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from whisper.model import Whisper

from tests.whisper.support import SONGS, assert_same_bits, pcm, relative_l2
from wealy_ray.errors import ConfigError
from wealy_ray.whisper import (
    DecodeOptions,
    Engine,
    EngineOptions,
    Kind,
    ReferenceOptions,
    Transcript,
    WindowResult,
    transcribe_track,
    transcribe_tracks,
)

CPU = EngineOptions(device="cpu", num_slots=3)
GREEDY = ReferenceOptions(temperatures=(0.0,))
FALLBACK = ReferenceOptions(temperatures=(0.0, 1.0))
REAL = {"de": "s2t004.mp3", "en": "s2t005.flac", "es": "s2t007.wav"}  # of two to three windows
INSTRUMENTAL = "s2t008.mp3"


@dataclass(frozen=True)
class Stock:
    """What `whisper.transcribe` gives, with the states that a hook on the final LayerNorm sees."""

    result: dict[str, Any]
    states: np.ndarray


def stock(
    model: Whisper, samples: np.ndarray, temperatures: tuple[float, ...] = (0.0,), **options: Any
) -> Stock:
    states: list[np.ndarray] = []
    hook = model.decoder.ln.register_forward_hook(lambda _module, _args, out: states.append(out[0].numpy()))
    try:
        result = whisper.transcribe(
            model, samples, temperature=temperatures if len(temperatures) > 1 else 0.0, fp16=False, **options
        )
    finally:
        hook.remove()
    detection = 0 if options.get("language") else 1
    return Stock(result, np.concatenate(states[detection:]) if states[detection:] else np.zeros((0, 1)))


def segments_of(result: dict[str, Any]) -> list[tuple]:
    return [(s["seek"], s["start"], s["end"], s["text"], s["tokens"]) for s in result["segments"]]


def assert_equal(ours: Transcript, reference: Stock) -> None:
    assert ours.language.code == reference.result["language"]
    assert [(s.seek, s.start_s, s.end_s, s.text, s.tokens) for s in ours.segments] == segments_of(
        reference.result
    )
    assert ours.text == reference.result["text"]
    states = np.concatenate([result.states for result in ours.results])
    assert states.shape == reference.states.shape
    assert relative_l2(states, reference.states).max() < 2e-5


@pytest.mark.parametrize(("prompt", "languages"), [(None, ["de"]), ("lyrics:", ["en", "es"])])
def test_whole_songs_are_those_of_stock(base: Whisper, prompt: str | None, languages: list[str]) -> None:
    songs = [pcm(SONGS / REAL[language]) for language in languages]
    with Engine(base, CPU, DecodeOptions(timestamps=True, initial_prompt=prompt)) as engine:
        ours = transcribe_tracks(engine, songs, GREEDY)
    for samples, transcript in zip(songs, ours, strict=True):
        assert_equal(transcript, stock(base, samples, initial_prompt=prompt))
    assert [transcript.language.code for transcript in ours] == languages
    assert all(len(transcript.results) > 1 for transcript in ours)


def synthetic(seconds: list[float], seed: int) -> list[np.ndarray]:
    """Noise whose loudness changes each second."""
    draw = np.random.default_rng(seed)
    songs = []
    for length in seconds:
        count = int(16_000 * length)
        loudness = np.repeat(draw.uniform(0, 0.3, int(length) + 1), 16_000)[:count]
        songs.append((draw.standard_normal(count) * loudness).astype(np.float32))
    return songs


@pytest.mark.parametrize(
    ("decode", "reference", "asked"),
    [
        ({}, {}, {}),
        ({"language": "de", "task": "translate"}, {}, {"language": "de", "task": "translate"}),
        ({}, {"condition_on_previous_text": False}, {"condition_on_previous_text": False}),
        ({"timestamps": False}, {}, {"without_timestamps": True}),
        # Every window of this model is improbable, and about half of them pass 1.9e-5: some are skipped.
        ({}, {"no_speech_threshold": 1.9e-5}, {"no_speech_threshold": 1.9e-5}),
        ({}, {"no_speech_threshold": None}, {"no_speech_threshold": None}),
        (
            {},
            {"no_speech_threshold": 0.0, "logprob_threshold": None},
            {"no_speech_threshold": 0.0, "logprob_threshold": None},
        ),
    ],
)
def test_every_setting_is_that_of_stock(tiny: Whisper, decode: dict, reference: dict, asked: dict) -> None:
    # Random weights come near to ties once in some 10^5 tokens; few tokens keep clear of them.
    songs = synthetic([45, 12.3, 0.004, 64], seed=0)
    with Engine(tiny, CPU, DecodeOptions(**{"timestamps": True, "max_tokens": 30, **decode})) as engine:
        ours = transcribe_tracks(engine, songs, ReferenceOptions(temperatures=(0.0,), **reference))
    for samples, transcript in zip(songs, ours, strict=True):
        if len(samples) < 100:  # less than one frame: no window, as in stock
            assert transcript.results == []
            assert transcript.text == whisper.transcribe(tiny, samples, fp16=False)["text"] == ""
        else:
            assert_equal(transcript, stock(tiny, samples, sample_len=30, **asked))


def test_a_context_that_fills_the_decoder_is_cut_as_in_stock(tiny: Whisper) -> None:
    (song,) = synthetic([33], seed=6)
    prompt = "la " * 300
    with Engine(tiny, CPU, DecodeOptions(timestamps=True, initial_prompt=prompt)) as engine:
        (ours,) = transcribe_tracks(engine, [song], GREEDY)
    assert_equal(ours, stock(tiny, song, initial_prompt=prompt))
    assert [int((result.kinds == Kind.PROMPT).sum()) for result in ours.results] == [224, 224]
    assert max(len(result.states) for result in ours.results) == 448


def test_skipped_windows_keep_their_states_but_not_their_text(tiny: Whisper) -> None:
    options = ReferenceOptions(temperatures=(0.0,), no_speech_threshold=0.0, logprob_threshold=None)
    with Engine(tiny, CPU, DecodeOptions(timestamps=True, max_tokens=20)) as engine:
        (transcript,) = transcribe_tracks(engine, synthetic([65], seed=1), options)
    assert [span.seek for span in transcript.spans] == [0, 3000, 6000]
    assert [span.size for span in transcript.spans] == [3000, 3000, 500]
    assert (transcript.text, transcript.segments) == ("", [])
    assert all(len(result.states) >= 20 for result in transcript.results)


def test_a_padded_track_is_a_longer_one(tiny: Whisper) -> None:
    (song,) = synthetic([20], seed=2)
    padded = np.pad(song, (0, 45 * 16_000 - len(song)))
    with Engine(tiny, CPU, DecodeOptions(timestamps=True, max_tokens=20)) as engine:
        (ours,) = transcribe_tracks(engine, [song], ReferenceOptions(temperatures=(0.0,), pad_to_s=45))
        (longer,) = transcribe_tracks(engine, [padded], ReferenceOptions(temperatures=(0.0,), pad_to_s=30))
    assert ours.spans == longer.spans
    assert ours.text == longer.text
    for one, other in zip(ours.results, longer.results, strict=True):
        assert_same_bits(one, other)


def test_only_the_first_window_has_the_prompt_and_later_ones_have_text(tiny: Whisper) -> None:
    with Engine(tiny, CPU, DecodeOptions(timestamps=True, initial_prompt="lyrics:")) as engine:
        (transcript,) = transcribe_tracks(engine, synthetic([70], seed=3), GREEDY)
        prompt = engine.vocabulary.prompt_tokens("lyrics:")
    contexts = [
        [
            int(token)
            for token, kind in zip(result.token_ids, result.kinds, strict=True)
            if kind == Kind.PROMPT
        ][1:]
        for result in transcript.results
    ]
    tokens: list[int] = []
    for span, context in zip(transcript.spans, contexts, strict=True):
        tokens = [t for s in transcript.segments if s.seek < span.seek for t in s.tokens]
        assert context == [*prompt, *tokens]
    assert tokens


# ---------------------------------------------------------------- fallback


def test_with_fallback_songs_are_stock_s_up_to_the_first_draw(base: Whisper) -> None:
    # One song that stock accepts at once, and one instrumental that it does not.
    accepted, refused = pcm(SONGS / "s2t011.ogg"), pcm(SONGS / INSTRUMENTAL)[: 16_000 * 20]
    options = DecodeOptions(timestamps=True, initial_prompt="lyrics:", max_tokens=60)
    with Engine(base, CPU, options) as engine:
        ours = transcribe_tracks(engine, [accepted, refused], FALLBACK)
        again = transcribe_tracks(engine, [refused], FALLBACK)[0]
    prompted = {"initial_prompt": "lyrics:", "sample_len": 60}
    reference = stock(base, accepted, FALLBACK.temperatures, **prompted)
    assert_equal(ours[0], reference)
    torch.manual_seed(0)
    drawn = whisper.transcribe(base, refused, temperature=FALLBACK.temperatures, fp16=False, **prompted)
    first = ours[1].results[0]
    assert drawn["segments"] == [] or drawn["segments"][0]["temperature"] > 0
    assert first.temperature > 0
    assert first.language == drawn["language"]
    # The draws are ours, and the same again without the neighbour.
    for one, other in zip(ours[1].results, again.results, strict=True):
        assert_same_bits(one, other)


def attempts(tiny: Whisper, song: np.ndarray, options: ReferenceOptions) -> Transcript:
    with Engine(tiny, CPU, DecodeOptions(timestamps=True, max_tokens=15)) as engine:
        return transcribe_tracks(engine, [song], options)[0]


def test_seeds_give_other_draws_and_the_same_ones_again(tiny: Whisper) -> None:
    (song,) = synthetic([40], seed=4)
    drawn = [attempts(tiny, song, ReferenceOptions(temperatures=(1.0,), seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0].text == drawn[1].text
    assert drawn[0].text != drawn[2].text
    assert [result.temperature for result in drawn[0].results] == [1.0, 1.0][: len(drawn[0].results)]


def test_neighbours_and_order_change_no_draw(tiny: Whisper) -> None:
    songs = synthetic([33, 64, 8, 41, 20], seed=5)
    options = ReferenceOptions(temperatures=(0.0, 0.4, 1.0))
    alone = [attempts(tiny, song, options) for song in songs]

    async def shuffled(engine: Engine) -> dict[int, Transcript]:
        found: dict[int, Transcript] = {}

        async def one(index: int) -> None:
            await asyncio.sleep(random.Random(index).random() / 50)
            found[index] = await transcribe_track(engine, songs[index], options)

        await asyncio.gather(*(one(index) for index in reversed(range(len(songs)))))
        return found

    with Engine(tiny, CPU, DecodeOptions(timestamps=True, max_tokens=15)) as engine:
        found = asyncio.run(shuffled(engine))
    for index, expected in enumerate(alone):
        assert found[index].spans == expected.spans
        for one, other in zip(found[index].results, expected.results, strict=True):
            assert_same_bits(one, other)


def outcome(*, logprob: float, ratio: float, silence: float) -> WindowResult:
    empty = np.zeros(0)
    scores = {"no_speech_prob": silence, "avg_logprob": logprob, "compression_ratio": ratio}
    return WindowResult(
        tokens=[], text="", language="en", language_probability=1.0, temperature=0.0, states=empty,
        token_ids=empty, kinds=empty, ended="eot", **scores,
    )  # fmt: skip


@pytest.mark.parametrize("logprob", [-1.5, -1.0, -0.5])
@pytest.mark.parametrize("ratio", [1.0, 2.4, 3.0])
@pytest.mark.parametrize("silence", [0.1, 0.6, 0.9])
@pytest.mark.parametrize(
    "without", [(), ("logprob_threshold",), ("compression_ratio_threshold",), ("no_speech_threshold",)]
)
def test_attempts_are_accepted_and_skipped_as_in_stock(
    logprob: float, ratio: float, silence: float, without: tuple[str, ...]
) -> None:
    # The rule as the source of `transcribe` has it, step by step.
    limits = {"compression_ratio_threshold": 2.4, "logprob_threshold": -1.0, "no_speech_threshold": 0.6}
    limits |= dict.fromkeys(without)
    ratio_limit, logprob_limit, silence_limit = limits.values()
    needs_fallback = False
    if ratio_limit is not None and ratio > ratio_limit:
        needs_fallback = True
    if logprob_limit is not None and logprob < logprob_limit:
        needs_fallback = True
    if (
        silence_limit is not None
        and silence > silence_limit
        and logprob_limit is not None
        and logprob < logprob_limit
    ):
        needs_fallback = False
    should_skip = False
    if silence_limit is not None:
        should_skip = silence > silence_limit
        if logprob_limit is not None and logprob > logprob_limit:
            should_skip = False
    options = ReferenceOptions(**limits)
    result = outcome(logprob=logprob, ratio=ratio, silence=silence)
    assert options.needs_fallback(result) == needs_fallback
    assert options.skips(result) == should_skip


def test_without_temperatures_nothing_can_be_tried() -> None:
    for wrong in ((), (0.0, -0.2)):
        with pytest.raises(ConfigError, match="at least 0, and at least one"):
            ReferenceOptions(temperatures=wrong)
