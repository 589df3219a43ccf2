"""The vectorised rules against openai-whisper's own filters, on random logits and grown histories."""

from __future__ import annotations

import pytest
import torch
from whisper.decoding import ApplyTimestampRules, GreedyDecoder, LogitFilter, SuppressBlank, SuppressTokens
from whisper.model import Whisper

from wealy_ray.whisper.rules import GreedyRules
from wealy_ray.whisper.vocabulary import Vocabulary

NUM_ROWS = 6
NUM_STEPS = 25
INITIAL = [50258, 50259, 50359]


def stock_filters(vocabulary: Vocabulary, *, timestamps: bool) -> list[LogitFilter]:
    tokenizer = vocabulary.tokenizer
    control = [
        tokenizer.transcribe,
        tokenizer.translate,
        tokenizer.sot,
        tokenizer.sot_prev,
        tokenizer.sot_lm,
        tokenizer.no_speech,
    ]
    filters: list[LogitFilter] = [
        SuppressBlank(tokenizer, len(INITIAL)),
        SuppressTokens([*tokenizer.non_speech_tokens, *control]),
    ]
    if timestamps:
        filters.append(ApplyTimestampRules(tokenizer, len(INITIAL), 50))
    return filters


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_choices_are_those_of_stock(tiny: Whisper, seed: int, timestamps: bool) -> None:
    vocabulary = Vocabulary.of(tiny)
    filters = stock_filters(vocabulary, timestamps=timestamps)
    greedy = GreedyDecoder(0.0, vocabulary.eot)
    rules = GreedyRules(vocabulary, NUM_ROWS, timestamps=timestamps, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([INITIAL] * NUM_ROWS)
    sum_logprobs = torch.zeros(NUM_ROWS)
    ours_sum = torch.zeros(NUM_ROWS)
    sampling = torch.ones(NUM_ROWS, dtype=torch.bool)
    kinds = set()
    for _ in range(NUM_STEPS):
        logits = torch.randn(NUM_ROWS, tiny.dims.n_vocab, generator=generator) * 3
        # Timestamps compete as a sum: their level decides which rule fires.
        logits[:, vocabulary.timestamp_begin :] += torch.randn(NUM_ROWS, 1, generator=generator) * 6
        logits[:, vocabulary.eot] = -50.0  # an ended row is another matter
        choice = rules.choose(logits.clone())
        rules.record(choice.tokens, sampling)
        ours_sum += choice.logprobs
        for logit_filter in filters:
            logit_filter.apply(logits, tokens)
        tokens, _ = greedy.update(tokens, logits, sum_logprobs)
        assert choice.tokens.tolist() == tokens[:, -1].tolist()
        kinds |= {bool(token >= vocabulary.timestamp_begin) for token in choice.tokens.tolist()}
    torch.testing.assert_close(ours_sum, sum_logprobs, rtol=1e-5, atol=1e-4)
    assert kinds == ({False, True} if timestamps else kinds)


def test_rows_that_do_not_sample_remember_nothing(tiny: Whisper) -> None:
    rules = GreedyRules(Vocabulary.of(tiny), 2, timestamps=True, device=torch.device("cpu"))
    rules.record(torch.tensor([50400, 50400]), torch.tensor([True, False]))
    assert rules.latest_timestamp_B.tolist() == [36, -1]
    assert rules.first_B.tolist() == [False, True]
    rules.reset(0)
    assert rules.latest_timestamp_B.tolist() == [-1, -1]
    assert rules.first_B.tolist() == [True, True]
