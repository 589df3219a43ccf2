"""Transcripts as vectors of a sentence encoder; their cosine (`VectorScores.cosine`) is a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from wealy_ray.errors import ConfigError
from wealy_ray.retrieval.text import text_extra

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def sentence_vectors(texts: Sequence[str], model: str) -> np.ndarray:
    """Encodes transcripts, float32 [num_texts, d].

    An encoder reads a transcript's beginning only, as many tokens as it was made for (`all-MiniLM-L6-v2`: 256).
    Last bits depend on which texts share a batch, so vectors are to be stored, not computed twice.

    Args:
        texts: Transcripts; `without_words` tells which of them are to be `missing`.
        model: Name or folder of a sentence-transformers model.

    Raises:
        ConfigError: The extra `text` is not installed, or the model cannot be loaded.
    """
    return encode(load_encoder(model), texts)


def load_encoder(model: str) -> SentenceTransformer:
    """Loads a sentence encoder, onto a GPU where there is one.

    Args:
        model: Name or folder of a sentence-transformers model.

    Raises:
        ConfigError: The extra `text` is not installed, or the model cannot be loaded.
    """
    with text_extra():
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of loading: not what is being done here
    try:
        return SentenceTransformer(model)
    except (OSError, ValueError) as e:
        raise ConfigError(f"the sentence model '{model}' cannot be loaded: {e}") from e


def encode(encoder: SentenceTransformer, texts: Sequence[str]) -> np.ndarray:
    """Vectors of texts, float32 [num_texts, d]; `num_texts` is not 0."""
    vectors = encoder.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
    return np.asarray(vectors, np.float32)
