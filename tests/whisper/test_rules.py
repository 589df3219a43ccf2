"""The vectorised rules against openai-whisper's own filters, on random logits and grown histories."""

from __future__ import annotations

import pytest
import torch
from whisper.decoding import ApplyTimestampRules, GreedyDecoder, LogitFilter, SuppressBlank, SuppressTokens
from whisper.model import Whisper

from wealy_ray.whisper.rules import SamplingRules
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
    rules = SamplingRules(vocabulary, NUM_ROWS, timestamps=timestamps, device=torch.device("cpu"))
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
    rules = SamplingRules(Vocabulary.of(tiny), 2, timestamps=True, device=torch.device("cpu"))
    rules.record(torch.tensor([50400, 50400]), torch.tensor([True, False]))
    assert rules.latest_timestamp_B.tolist() == [36, -1]
    assert rules.first_B.tolist() == [False, True]
    rules.reset(0)
    assert rules.latest_timestamp_B.tolist() == [-1, -1]
    assert rules.first_B.tolist() == [True, True]


@pytest.mark.parametrize("timestamps", [False, True])
def test_draws_follow_the_distribution_that_stock_samples_from(tiny: Whisper, timestamps: bool) -> None:
    # One row's logits for many rows, whose draws are spread evenly: each token must come up as often as its
    # probability says, to within the two numbers that its ends may share.
    vocabulary, num_rows, temperature = Vocabulary.of(tiny), 2000, 0.7
    rules = SamplingRules(vocabulary, num_rows, timestamps=timestamps, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    logits_V = torch.randn(tiny.dims.n_vocab, generator=generator) * 4
    logits_V[vocabulary.timestamp_begin :] -= 2.0
    tokens = torch.tensor([[*INITIAL, 50370, 400]])
    for token in (50370, 400):
        rules.record(torch.full((num_rows,), token), torch.ones(num_rows, dtype=torch.bool))
    uniform = (torch.arange(num_rows, dtype=torch.float64) + 0.5) / num_rows
    choice = rules.choose(logits_V.repeat(num_rows, 1), (torch.full((num_rows,), temperature), uniform))
    stock_V = logits_V[None].clone()
    for logit_filter in stock_filters(vocabulary, timestamps=timestamps):
        logit_filter.apply(stock_V, tokens)
    probability_V = (stock_V[0] / temperature).softmax(dim=0)
    drawn_V = torch.bincount(choice.tokens, minlength=tiny.dims.n_vocab)
    assert (drawn_V - probability_V * num_rows).abs().max() <= 1.01
    torch.testing.assert_close(
        choice.logprobs, stock_V[0].log_softmax(dim=0)[choice.tokens], rtol=1e-4, atol=1e-4
    )


def test_a_row_that_does_not_draw_chooses_as_if_no_row_did(tiny: Whisper) -> None:
    rules = SamplingRules(Vocabulary.of(tiny), 3, timestamps=True, device=torch.device("cpu"))
    logits = torch.randn(3, tiny.dims.n_vocab, generator=torch.Generator().manual_seed(5))
    alone = rules.choose(logits.clone())
    temperature_B, uniform_B = torch.tensor([0.0, 1.0, 0.0]), torch.full((3,), 0.97, dtype=torch.float64)
    beside = rules.choose(logits.clone(), (temperature_B, uniform_B))
    for row in (0, 2):
        assert alone.tokens[row] == beside.tokens[row]
        assert alone.logprobs[row] == beside.logprobs[row]
    assert alone.tokens[1] != beside.tokens[1]
