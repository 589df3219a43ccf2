"""One query against all tracks of a store: exact nearest tracks, and the lyrics that match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from wealy_ray.errors import ConfigError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.material import MATERIAL_SCHEMA, Material
from wealy_ray.retrieval.recipe import AverageEmbedding, TranscriptBaseline
from wealy_ray.retrieval.scores import Scores, VectorScores
from wealy_ray.retrieval.systems import build_scores
from wealy_ray.storage import Storage

By = Literal["embedding", "tfidf_characters", "tfidf_words", "more_like_this", "bm25", "avg_embedding"]
"""What may be compared: a model's vectors, transcripts in four ways, or mean states."""
BY: tuple[str, ...] = get_args(By)
LYRICS_SHOWN = 3
"""Shared passages of a query and a found track that are shown."""
FEWEST_WORDS, FEWEST_CHARACTERS = 2, 6
"""A shared passage is at least so long; characters count where there are no spaces."""


@dataclass(frozen=True)
class Found:
    """A track that was found.

    Attributes:
        rank: 1 for the nearest.
        track_id: The track.
        score: Similarity; its scale is that of what was compared.
        language: As Whisper detected it.
        lyrics: Passages that query and track share, the longest first.
    """

    rank: int
    track_id: str
    score: float
    language: str
    lyrics: tuple[str, ...]


def find_nearest(material: pa.Table, query: dict[str, Any], by: str, top: int) -> list[Found]:
    """Compares a query with every track.

    Args:
        material: `MATERIAL_SCHEMA`, all tracks of a store.
        query: A row of the same columns; null where it is not known. A track of the store does not find itself.
        by: What is compared.
        top: How many are wanted.

    Returns:
        The nearest tracks; fewer where the others have nothing that can be compared.

    Raises:
        ConfigError: The query has not what `by` compares.
        StoreError: A vector holds NaN or infinity.
    """
    asked = query["track_id"]
    others = material.filter(pa.array([t != asked for t in material["track_id"].to_pylist()], pa.bool_()))
    everyone = Material(
        pa.concat_tables([others, pa.Table.from_pylist([query], schema=MATERIAL_SCHEMA)]), splits={}
    )
    ids = everyone.table["track_id"].to_pylist()
    collection = Collection.of(ids, [None] * len(ids), is_candidate=[t != asked for t in ids])
    scores = _scores(collection, everyone, by)
    place = np.flatnonzero(collection.track_ids == asked)
    if scores.missing[place[0]]:
        raise ConfigError(
            "the query has no states: --by avg_embedding compares a track or an audio file"
            if by == "avg_embedding"
            else f"the query has no words that could be compared by {by}"
            + ("; try --by avg_embedding" if query["mean_all"] is not None else "")
        )
    row = scores.rows(place)[0].cpu().numpy()
    nearest = np.argsort(-row, kind="stable")[:top]
    chosen = [c for c in nearest if np.isfinite(row[c])]
    return describe(
        everyone, query, [(collection.track_ids[collection.candidates[c]], float(row[c])) for c in chosen]
    )


def describe(material: Material, query: dict[str, Any], nearest: Sequence[tuple[str, float]]) -> list[Found]:
    """Adds languages and shared lyrics to (track, score) pairs in their order."""
    rows = material.rows([track_id for track_id, _ in nearest])
    return [
        Found(
            rank,
            track_id,
            score,
            row["language"] or "",
            shared_lyrics(query["text"] or "", row["text"] or ""),
        )
        for rank, ((track_id, score), row) in enumerate(zip(nearest, rows, strict=True), 1)
    ]


def shared_lyrics(one: str, other: str) -> tuple[str, ...]:
    """The longest passages that two transcripts share, apart from case and punctuation, as the second writes them."""
    fewest = FEWEST_WORDS if _has_spaces(one) and _has_spaces(other) else FEWEST_CHARACTERS
    pattern = r"\w+" if fewest == FEWEST_WORDS else r"\w"
    (mine, _), (theirs, spans) = _tokens(one, pattern), _tokens(other, pattern)
    blocks = SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks()
    passages: dict[str, str] = {}
    for block in sorted(blocks, key=lambda b: (-b.size, b.b)):
        if block.size >= fewest:
            words = " ".join(theirs[block.b : block.b + block.size])
            passages.setdefault(words, other[spans[block.b][0] : spans[block.b + block.size - 1][1]])
    return tuple(" ".join(text.split()) for text in list(passages.values())[:LYRICS_SHOWN])


def _scores(collection: Collection, material: Material, by: str) -> Scores:
    kind = AverageEmbedding if by == "avg_embedding" else TranscriptBaseline
    system: AverageEmbedding | TranscriptBaseline = kind.model_validate({"kind": by, "name": by})
    return build_scores(system, collection, material, Storage(), scratch="", held_bytes=0)


def _tokens(text: str, pattern: str) -> tuple[list[str], list[tuple[int, int]]]:
    matches = list(re.finditer(pattern, text))
    return [m.group().casefold() for m in matches], [m.span() for m in matches]


def _has_spaces(text: str) -> bool:
    """Whether words are set apart, as they are not in Chinese, Japanese or Thai."""
    words = text.split()
    return not words or sum(map(len, words)) / len(words) < 20


def exact_nearest(scores: VectorScores, queries: np.ndarray, top: int) -> np.ndarray:
    """Columns int64 [len(queries), top] of the nearest candidates, the query itself left out."""
    rows = scores.rows(queries).cpu().numpy()
    own = np.searchsorted(scores.candidates, queries)
    rows[np.arange(len(queries)), own] = -np.inf
    return np.argsort(-rows, axis=1, kind="stable")[:, :top]
