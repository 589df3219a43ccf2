"""Baselines on transcripts: how far the sung words alone lead, without a trained model.

All of them are one sparse product, weights of a query's terms times what each term is worth in each candidate:

- `tfidf_words`, `tfidf_characters`: cosine of TF-IDF vectors;
- `more_like_this`: the same with only the query's strongest terms;
- `bm25`: Okapi BM25 as Lucene counts it.

Vocabulary and document frequencies come from the candidates that have text, never from a query that is no candidate:
in use, the query is not known when the index is built. A transcript without a known term is missing: it ranks last.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wealy_ray.errors import ConfigError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.scores import CPU, hide_missing

if TYPE_CHECKING:
    from scipy.sparse import csr_array

WORD_GRAMS = (1, 2)
"""Words and pairs of words. Of the published TF-IDF baseline only this and the cosine are known; the rest is
scikit-learn's default: lower case, words of two letters and more, raw counts, smooth idf."""
CHARACTER_GRAMS = (3, 5)
"""Characters per term, inside of words: for languages that inflect or put no space between words."""
MORE_LIKE_THIS_TERMS = 25
"""Terms that stand for a query: the default of Lucene's MoreLikeThis."""
BM25_K1 = 1.2
"""Saturation of repeated terms, Lucene's default."""
BM25_B = 0.75
"""How far long candidates are held back, Lucene's default."""
SPARSE_TILE = 32
"""Queries that are multiplied at a time: a product of sparse matrices takes more bytes than its dense result."""


@dataclass(eq=False)
class TermScores:
    """Sparse inner products of queries and candidates; each row is summed by itself, in the order of its terms.

    Attributes:
        query_weights: float32 [num_tracks, num_terms], what a term is worth to a query.
        candidate_weights: float32 [num_terms, num_candidates], what it is worth in a candidate.
        missing: bool [num_tracks], tracks without a known term.
        candidates: int64 [num_candidates], `Collection.candidates`.
    """

    query_weights: csr_array
    candidate_weights: csr_array
    missing: np.ndarray
    candidates: np.ndarray

    def rows(self, queries: np.ndarray, device: torch.device = CPU) -> Tensor:
        """See `Scores`; computed on the CPU, then moved to `device`."""
        out = np.empty((len(queries), len(self.candidates)), np.float32)
        for start in range(0, len(queries), SPARSE_TILE):
            tile = self.query_weights[queries[start : start + SPARSE_TILE]]
            (tile @ self.candidate_weights).toarray(out=out[start : start + SPARSE_TILE])
        scores = torch.from_numpy(out).to(device)
        hide_missing(scores, self.missing, queries, self.candidates)
        return scores


def tfidf_words(collection: Collection, texts: Sequence[str]) -> TermScores:
    """Cosine of TF-IDF vectors of words and pairs of words (`WORD_GRAMS`).

    Args:
        collection: Tracks.
        texts: Transcript of each, in the order of `collection.track_ids`; "" where there is none.

    Raises:
        ConfigError: The extra `text` is not installed.
    """
    counts = _count_terms(collection, texts, "word", WORD_GRAMS)
    weights = _tfidf(collection, counts)
    return _term_scores(collection, counts, weights, _transposed(weights[collection.candidates]))


def tfidf_characters(collection: Collection, texts: Sequence[str]) -> TermScores:
    """Cosine of TF-IDF vectors of runs of characters inside of words (`CHARACTER_GRAMS`).

    Args and Raises: see `tfidf_words`.
    """
    counts = _count_terms(collection, texts, "char_wb", CHARACTER_GRAMS)
    weights = _tfidf(collection, counts)
    return _term_scores(collection, counts, weights, _transposed(weights[collection.candidates]))


def more_like_this(collection: Collection, texts: Sequence[str]) -> TermScores:
    """Cosine of a query's `MORE_LIKE_THIS_TERMS` strongest words with the candidates' TF-IDF vectors.

    After Lucene's MoreLikeThis, without its thresholds on frequencies (they empty a small collection), but a word
    that no other candidate has is never chosen: it would take a place and find nothing.

    Args and Raises: see `tfidf_words`.
    """
    counts = _count_terms(collection, texts, "word", (1, 1))
    from sklearn.preprocessing import normalize

    weights = _tfidf(collection, counts)
    num_holders = weights[collection.candidates].count_nonzero(axis=0)  # candidates that have a term
    term_is_shared = num_holders[weights.indices] > np.repeat(
        collection.is_candidate, np.diff(weights.indptr)
    )
    queries = weights.copy()
    queries.data *= term_is_shared
    strong = _strongest(queries, MORE_LIKE_THIS_TERMS)
    if counts.shape[1]:  # scikit-learn refuses vectors without a dimension
        strong = normalize(strong)
    return _term_scores(collection, counts, strong, _transposed(weights[collection.candidates]))


def bm25(collection: Collection, texts: Sequence[str]) -> TermScores:
    """BM25 of words; a word that a query repeats counts as often.

    Args and Raises: see `tfidf_words`.
    """
    counts = _count_terms(collection, texts, "word", (1, 1))
    with text_extra():
        import bm25s
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    from scipy.sparse import csr_array

    rows = counts[collection.candidates]
    spoken = np.flatnonzero(np.diff(rows.indptr))  # empty candidates would shorten the mean length
    num_terms = counts.shape[1]
    shape = (num_terms, len(collection.candidates))
    if not num_terms:
        return _term_scores(collection, counts, counts, csr_array(shape, dtype=np.float32))
    # one int object per term, however often it is sung: a list of fresh ones takes five times the memory
    terms = np.arange(num_terms).astype(object)
    documents = [
        np.repeat(terms[rows.indices[start:stop]], rows.data[start:stop]).tolist()
        for start, stop in zip(rows.indptr[spoken], rows.indptr[spoken + 1], strict=True)
    ]
    index = bm25s.BM25(k1=BM25_K1, b=BM25_B, method="lucene")
    vocabulary = {str(term): term for term in range(num_terms)}
    index.index((documents, vocabulary), create_empty_token=False, show_progress=False)
    # columns of [documents, terms] are rows of its transposed
    found = index.scores
    weights = csr_array((found["data"], spoken[found["indices"]], found["indptr"]), shape=shape)
    return _term_scores(collection, counts, counts, weights)


def without_words(texts: Sequence[str]) -> np.ndarray:
    """Texts without a letter or digit, as Whisper writes music ("", "...", a note sign): bool [num_texts]."""
    return np.array([not any(map(str.isalnum, text)) for text in texts], bool)


@contextmanager
def text_extra() -> Iterator[None]:
    """Imports inside fail with the name of the extra that they need.

    Raises:
        ConfigError: A module is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"baselines on transcripts need '{e.name}', which is not installed: pip install 'wealy-ray[text]'"
        ) from e


def _count_terms(
    collection: Collection, texts: Sequence[str], analyzer: str, grams: tuple[int, int]
) -> csr_array:
    """How often each track has each term that a candidate has: int64 [num_tracks, num_terms]."""
    with text_extra():
        from scipy.sparse import csr_array
        from sklearn.feature_extraction.text import CountVectorizer

    assert len(texts) == len(collection), (len(texts), len(collection))
    spoken = ["" if empty else text for text, empty in zip(texts, without_words(texts), strict=True)]
    vectorizer = CountVectorizer(analyzer=analyzer, ngram_range=grams)
    analyze = vectorizer.build_analyzer()
    if not any(analyze(text) for text in spoken):  # scikit-learn refuses a corpus without a term
        return csr_array((len(texts), 0), dtype=np.int64)
    counts = csr_array(vectorizer.fit_transform(spoken))
    known = counts[collection.candidates].count_nonzero(axis=0) > 0
    counts = csr_array(counts[:, np.flatnonzero(known)])
    counts.sort_indices()  # the order of the sum
    return counts


def _tfidf(collection: Collection, counts: csr_array) -> csr_array:
    """TF-IDF vectors of length one, float32; document frequencies are those of the candidates with text."""
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import TfidfTransformer

    if not counts.shape[1]:
        return counts.astype(np.float32)
    of_candidates = counts[collection.candidates]
    transformer = TfidfTransformer().fit(of_candidates[np.diff(of_candidates.indptr) > 0])
    weights = csr_array(transformer.transform(counts))
    weights.sort_indices()
    return weights.astype(np.float32)


def _strongest(weights: csr_array, num_terms: int) -> csr_array:
    """The heaviest terms of each row; of equal weights the earlier term stays."""
    kept = np.zeros(len(weights.data), bool)
    for start, stop in zip(weights.indptr[:-1], weights.indptr[1:], strict=True):
        kept[start + np.argsort(-weights.data[start:stop], kind="stable")[:num_terms]] = True
    strong = weights.copy()
    strong.data *= kept
    strong.eliminate_zeros()
    return strong


def _transposed(weights: csr_array) -> csr_array:
    return weights.T.tocsr()


def _term_scores(
    collection: Collection, counts: csr_array, query_weights: csr_array, candidate_weights: csr_array
) -> TermScores:
    return TermScores(
        query_weights.astype(np.float32),
        candidate_weights.astype(np.float32),
        np.diff(counts.indptr) == 0,
        collection.candidates,
    )
