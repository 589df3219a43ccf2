"""From a finished row to its `WindowResult`: labels for the states, text, whisper's scores."""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor
from whisper.utils import compression_ratio

from wealy_ray.whisper.rows import RowStart
from wealy_ray.whisper.types import Kind, Language, WindowResult
from wealy_ray.whisper.vocabulary import Vocabulary


def window_result(
    vocabulary: Vocabulary,
    start: RowStart,
    row: list[Tensor],
    language: Language,
    *,
    cut_at: int | None = None,
) -> WindowResult:
    """Assemble the result of one window.

    Args:
        vocabulary: The model's token ids.
        start: How the window began.
        row: What `SlotDecoder.read` gives: states [n, D], tokens and log-probabilities [n + 1], no-speech
            probability [1].
        language: Detected or forced.
        cut_at: Sampled tokens after which the repetition guard ended the window.

    Returns:
        The result; the formulas of average log-probability and compression ratio are whisper's.
    """
    states, fed_and_last, logprobs, no_speech = (tensor.numpy() for tensor in row)
    num_initial = len(start.initial)
    num_sampled = len(fed_and_last) - num_initial if cut_at is None else cut_at
    upto = num_initial + num_sampled
    sampled = fed_and_last[num_initial:upto].tolist()
    ended: Literal["eot", "max_tokens", "repetition"] = "repetition" if cut_at is not None else "max_tokens"
    if sampled[-1] == vocabulary.eot:
        ended = "eot"
    tokens = sampled[:-1] if ended == "eot" else sampled
    text = vocabulary.tokenizer.decode(tokens).strip()
    roles = [Kind.PROMPT if index < start.sot else Kind.SOT for index in range(num_initial - 1)]
    leading = fed_and_last[: num_initial - 1].tolist()
    return WindowResult(
        tokens=tokens,
        text=text,
        language=language.code,
        language_probability=language.probability,
        no_speech_prob=float(no_speech[0]),
        avg_logprob=float(np.sum(logprobs[num_initial:upto], dtype=np.float64)) / (len(tokens) + 1),
        compression_ratio=compression_ratio(text),
        temperature=start.temperature,
        states=states[: upto - 1],
        token_ids=np.array(leading + sampled, dtype=np.int32),
        kinds=np.array(roles + [_predicts(token, vocabulary) for token in sampled], dtype=np.int8),
        ended=ended,
    )


def _predicts(token: int, vocabulary: Vocabulary) -> Kind:
    if token == vocabulary.eot:
        return Kind.EOT
    return Kind.TIMESTAMP if token >= vocabulary.timestamp_begin else Kind.TEXT
