"""From a finished row to its `WindowResult`: labels for the states, text, whisper's scores."""

from __future__ import annotations

import numpy as np
from whisper.utils import compression_ratio

from wealy_ray.whisper.decoder import RowReading
from wealy_ray.whisper.types import Kind, Language, WindowResult
from wealy_ray.whisper.vocabulary import Vocabulary


def window_result(
    vocabulary: Vocabulary, initial: list[int], sampled: list[int], reading: RowReading, language: Language
) -> WindowResult:
    """Assemble the result of one window.

    Args:
        vocabulary: The model's token ids.
        initial: Initial tokens as fed, but for a detected language, which `language` tells.
        sampled: Sampled tokens, EOT included if there is one.
        reading: The row's states and scores; `len(initial) + len(sampled) - 1` states.
        language: Detected or forced.

    Returns:
        The result; the formulas of average log-probability and compression ratio are whisper's.
    """
    assert len(reading.states) == len(initial) + len(sampled) - 1
    fed = list(initial[:-1])
    sot = initial.index(vocabulary.sot)
    if vocabulary.language_codes and len(fed) > sot + 1:
        fed[sot + 1] = vocabulary.first_language + reading.language
    roles = [Kind.PROMPT if index < sot else Kind.SOT for index in range(len(fed))]
    tokens = [token for token in sampled if token != vocabulary.eot]
    text = vocabulary.tokenizer.decode(tokens).strip()
    return WindowResult(
        tokens=tokens,
        text=text,
        language=language.code,
        language_probability=language.probability,
        no_speech_prob=reading.no_speech_prob,
        avg_logprob=reading.sum_logprob / (len(tokens) + 1),
        compression_ratio=compression_ratio(text),
        temperature=0.0,
        states=reading.states,
        token_ids=np.array(fed + sampled, dtype=np.int32),
        kinds=np.array(roles + [_predicts(token, vocabulary) for token in sampled], dtype=np.int8),
    )


def _predicts(token: int, vocabulary: Vocabulary) -> Kind:
    if token == vocabulary.eot:
        return Kind.EOT
    return Kind.TIMESTAMP if token >= vocabulary.timestamp_begin else Kind.TEXT
