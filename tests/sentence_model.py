"""A sentence-transformers model that is small enough to be made in a test."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest


def make_sentence_model(folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
    """A BERT of two small layers and random weights that knows the words of `texts`; returns its folder."""
    pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for line in texts for word in re.findall(r"\w+", line.lower())})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    bert = BertModel(config).eval()
    bert.save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt"), strip_accents=False).save_pretrained(folder / "bert")
    encoder = models.Transformer(str(folder / "bert"), max_seq_length=32)
    pooling = models.Pooling(32, pooling_mode="mean")
    SentenceTransformer(modules=[encoder, pooling], device="cpu").save(str(folder / "sentence"))
    return folder / "sentence"
