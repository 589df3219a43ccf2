"""Options of the paper's ablations, against stock: prompts, layers, the repetition guard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import whisper
from whisper.model import Whisper

from tests.whisper.support import decode_all, noise, relative_l2, tiny_model
from wealy_ray.errors import ConfigError
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, Kind, decode_tracks

CPU = EngineOptions(device="cpu", num_slots=3)


@pytest.mark.parametrize("language", [None, "en"])
def test_a_prompt_is_what_it_is_in_stock(
    base: Whisper, features: list[torch.Tensor], language: str | None
) -> None:
    options = DecodeOptions(initial_prompt="lyrics:", language=language, timestamps=True, max_tokens=20)
    with Engine(base, CPU, options) as engine:
        (results,) = decode_tracks(engine, [torch.stack(features[:3])])
    if language is None:  # whisper asks for it without the prompt
        _, probabilities = base.detect_language(features[0])
        language, probability = max(probabilities.items(), key=lambda item: item[1])
        assert results[0].language == language
        assert results[0].language_probability == pytest.approx(probability, abs=1e-5)
    for ours, window in zip(results, features[:3], strict=True):
        states: list[np.ndarray] = []
        hook = base.decoder.ln.register_forward_hook(lambda _m, _a, out, s=states: s.append(out[0].numpy()))
        stock = whisper.decode(
            base,
            window,
            whisper.DecodingOptions(language=language, prompt="lyrics:", fp16=False, sample_len=20),
        )
        hook.remove()
        assert ours.tokens == stock.tokens
        assert ours.no_speech_prob == pytest.approx(stock.no_speech_prob, abs=1e-5)
        assert relative_l2(ours.states, np.concatenate(states)).max() < 2e-5
        prompt = [50361, *engine.vocabulary.tokenizer.encode(" lyrics:")]
        assert list(ours.token_ids[: len(prompt)]) == prompt
        assert [Kind(kind) for kind in ours.kinds[: len(prompt) + 2]] == [Kind.PROMPT] * len(prompt) + [
            Kind.SOT
        ] * 2


@pytest.mark.parametrize("block", [0, 1])
def test_states_of_another_layer_are_that_layer_s(tiny: Whisper, block: int) -> None:
    options = DecodeOptions(timestamps=False, max_tokens=12, state_layer=f"decoder.blocks.{block}")
    (window,) = noise(1)
    (ours,) = decode_all(tiny, [window], 2, options)
    states: list[np.ndarray] = []
    hook = tiny.decoder.blocks[block].register_forward_hook(lambda _m, _a, out: states.append(out[0].numpy()))
    asked = whisper.DecodingOptions(
        language=ours.language, without_timestamps=True, fp16=False, sample_len=12
    )
    whisper.decode(tiny, window, asked)
    hook.remove()
    assert relative_l2(ours.states, np.concatenate(states)).max() < 2e-5
    last = len(tiny.decoder.blocks) - 1
    if block == last:  # before the final LayerNorm
        (normed,) = decode_all(tiny, [window], 2, DecodeOptions(timestamps=False, max_tokens=12))
        again = tiny.decoder.ln(torch.from_numpy(ours.states)).detach().numpy()
        np.testing.assert_allclose(again, normed.states, atol=1e-5)


def test_a_layer_that_is_not_there_is_refused(tiny: Whisper) -> None:
    for wrong in ("decoder.blocks.2", "encoder.ln_post", "decoder.blocks.-1"):
        with pytest.raises(ConfigError, match=r"this model has 'decoder.ln' and 'decoder.blocks.0' to"):
            Engine(tiny, CPU, DecodeOptions(state_layer=wrong))


def loop_of(tokens: list[int], times: int) -> int | None:
    """The slow way round: sampled tokens when some sequence of up to 32 has been said `times` times in a row."""
    for count in range(1, len(tokens) + 1):
        for period in range(1, 33):
            tail = tokens[max(0, count - period * times) : count]
            if len(tail) == period * times and tail == tail[:period] * times:
                return count
    return None


@pytest.mark.parametrize("times", [2, 3])
def test_the_guard_cuts_a_loop_and_says_so(times: int) -> None:
    model = tiny_model()
    windows = noise(8)
    free = decode_all(model, windows, 3, DecodeOptions(timestamps=False))
    guarded = decode_all(model, windows, 3, DecodeOptions(timestamps=False, max_repeats=times))
    cut = 0
    for whole, ours in zip(free, guarded, strict=True):
        count = loop_of(whole.tokens, times)
        assert whole.ended == "max_tokens"  # off by default: a loop goes on to the last token
        if count is None:
            assert ours.tokens == whole.tokens
            continue
        cut += 1
        assert ours.ended == "repetition"
        assert ours.tokens == whole.tokens[:count]
        np.testing.assert_array_equal(ours.states, whole.states[: len(ours.states)])
        assert len(ours.states) == len(ours.kinds) == 4 + count - 1
    assert cut > 0


def test_a_guard_that_would_cut_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_repeats is 1; it must be at least 2"):
        DecodeOptions(max_repeats=1)


def test_a_prompt_that_spells_special_tokens_is_refused(tiny: Whisper) -> None:
    with pytest.raises(ConfigError, match="may not spell special tokens"):
        Engine(tiny, CPU, DecodeOptions(initial_prompt="<|en|> lyrics"))
