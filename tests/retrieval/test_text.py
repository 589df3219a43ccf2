import math
import pickle
import re
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tests.sentence_model import make_sentence_model
from wealy_ray.errors import ConfigError
from wealy_ray.retrieval import text
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.scores import VectorScores
from wealy_ray.retrieval.sentence import sentence_vectors
from wealy_ray.retrieval.text import bm25, more_like_this, tfidf_characters, tfidf_words, without_words

NOTES = "♪ ♪"  # how Whisper writes music
TEXTS = [
    "We sail the silver river, we sail away",
    "silver river, sail away with me",
    "Love is a burning flame, a burning flame",
    "the flame of love is burning low",
    "   \n",
    NOTES,
    "der graue Wolf heult in der Nacht",
    "graue Wölfe heulten nachts",
]
SPOKEN = [0, 1, 2, 3, 6, 7]
BUILDERS = [tfidf_words, tfidf_characters, more_like_this, bm25]


def collection_of(texts, **kwargs):
    return Collection.of([f"t{i:04d}" for i in range(len(texts))], [None] * len(texts), **kwargs)


def words_of(line):
    return re.findall(r"\w\w+", line.lower())


def words_and_pairs(line):
    words = words_of(line)
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def character_grams(line):
    grams = []
    for word in line.lower().split():
        padded = f" {word} "
        for size in (3, 4, 5):
            if size >= len(padded):  # a short word is one term, once
                grams.append(padded)
                break
            grams += [padded[i : i + size] for i in range(len(padded) - size + 1)]
    return grams


def slow_tfidf(texts, corpus, terms_of):
    """One dict of weights per text; document frequencies from `corpus`."""
    documents = [set(terms_of(line)) for line in corpus if terms_of(line)]
    frequency = Counter(term for document in documents for term in document)
    vectors = []
    for line in texts:
        counts = Counter(term for term in terms_of(line) if term in frequency)
        vector = {
            term: count * (math.log((1 + len(documents)) / (1 + frequency[term])) + 1)
            for term, count in counts.items()
        }
        length = math.sqrt(sum(weight**2 for weight in vector.values()))
        vectors.append({term: weight / length for term, weight in vector.items()})
    return vectors


def slow_bm25(query, corpus):
    documents = [words_of(line) for line in corpus]
    filled = [words for words in documents if words]
    mean_length = sum(map(len, filled)) / len(filled)
    scores = []
    for words in documents:
        score = 0.0
        for term in words_of(query):
            holders = sum(term in other for other in filled)
            idf = math.log(1 + (len(filled) - holders + 0.5) / (holders + 0.5))
            count = words.count(term)
            score += idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * len(words) / mean_length))
        scores.append(score)
    return scores


def many_texts(num_texts=150):
    """Texts of a vocabulary with common and rare words; some are empty, some equal."""
    rng = np.random.default_rng(7)
    words = np.array([f"w{i}" for i in range(400)])
    texts = [" ".join(words[rng.zipf(1.3, rng.integers(1, 80)) % 400]) for _ in range(num_texts)]
    texts[5] = texts[77] = ""
    texts[9] = texts[10]
    return texts


@pytest.mark.parametrize(
    ("build", "terms_of"), [(tfidf_words, words_and_pairs), (tfidf_characters, character_grams)]
)
def test_tfidf_equals_a_loop(build, terms_of):
    is_candidate = [i != 3 for i in range(len(TEXTS))]  # track 3 only asks: its words must not enter the idf
    scores = build(collection_of(TEXTS, is_candidate=is_candidate), TEXTS)
    clean = ["" if i in (4, 5) else line for i, line in enumerate(TEXTS)]
    corpus = [line for line, answers in zip(clean, is_candidate, strict=True) if answers]
    queries, answers = slow_tfidf(clean, corpus, terms_of), slow_tfidf(corpus, corpus, terms_of)
    got = scores.rows(np.arange(len(TEXTS))).numpy()
    assert got.shape == (8, 7)
    for i in range(len(TEXTS)):
        for j in range(len(corpus)):
            want = sum(weight * answers[j].get(term, 0) for term, weight in queries[i].items())
            if queries[i] and answers[j]:
                assert got[i, j] == pytest.approx(want, abs=1e-6)
            else:
                assert got[i, j] == -np.inf


def test_bm25_equals_the_formula():
    texts = many_texts()
    scores = bm25(collection_of(texts), texts)
    got = scores.rows(np.array([0, 40, 149])).numpy()
    for row, i in zip(got, [0, 40, 149], strict=True):
        want = slow_bm25(texts[i], texts)
        for j, score in enumerate(want):
            if texts[j]:
                assert row[j] == pytest.approx(score, rel=1e-5, abs=1e-5)
            else:
                assert row[j] == -np.inf


def test_more_like_this_asks_with_the_strongest_shared_words(monkeypatch):
    monkeypatch.setattr(text, "MORE_LIKE_THIS_TERMS", 2)
    texts = [
        "unheard unheard unheard harbour harbour lantern the the the",
        "harbour the",
        "lantern the",
        "the the song",
        "the song",
    ]
    got = more_like_this(collection_of(texts), texts).rows(np.array([0])).numpy()[0]
    vectors = slow_tfidf(texts, texts, words_of)
    # "unheard" weighs most, but no other track has it; "lantern" weighs less than three times "the"
    assert sorted(vectors[0], key=vectors[0].get) == ["lantern", "the", "harbour", "unheard"]
    asked = {term: vectors[0][term] for term in ("harbour", "the")}
    length = math.sqrt(sum(weight**2 for weight in asked.values()))
    want = [sum(w / length * vector.get(term, 0) for term, w in asked.items()) for vector in vectors]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("build", BUILDERS)
def test_the_nearest_is_the_song_with_the_same_words(build):
    scores = build(collection_of(TEXTS), TEXTS)
    got = scores.rows(np.array(SPOKEN)).numpy()
    got[np.arange(len(SPOKEN)), SPOKEN] = -np.inf
    nearest = dict(zip(SPOKEN, got.argmax(1).tolist(), strict=True))
    assert nearest == {0: 1, 1: 0, 2: 3, 3: 2, 6: 7, 7: 6}


@pytest.mark.parametrize("build", BUILDERS)
def test_transcripts_without_words_are_missing(build):
    scores = build(collection_of(TEXTS), TEXTS)
    assert np.flatnonzero(scores.missing).tolist() == [4, 5]
    got = scores.rows(np.arange(len(TEXTS))).numpy()
    assert (got[[4, 5]] == -np.inf).all()
    assert (got[:, [4, 5]] == -np.inf).all()
    assert np.isfinite(got[np.ix_(SPOKEN, SPOKEN)]).all()


@pytest.mark.parametrize("build", BUILDERS)
def test_nobody_sings(build):
    texts = ["", NOTES, " ... "]
    scores = build(collection_of(texts), texts)
    assert scores.missing.all()
    assert (scores.rows(np.array([2, 0])).numpy() == -np.inf).all()


@pytest.mark.parametrize("build", BUILDERS)
def test_a_query_of_unknown_words_is_missing(build):
    texts = ["silver river", "golden river", "xylophon quiz"]
    scores = build(collection_of(texts, is_candidate=[True, True, False]), texts)
    assert scores.missing.tolist() == [False, False, True]
    assert (scores.rows(np.array([2])).numpy() == -np.inf).all()


@pytest.mark.parametrize("build", BUILDERS)
def test_bits_do_not_depend_on_the_block_nor_on_travel(build):
    texts = many_texts()
    scores = build(collection_of(texts, is_candidate=np.arange(len(texts)) % 7 != 3), texts)
    rng = np.random.default_rng(0)
    queries = rng.permutation(len(texts))
    whole = scores.rows(queries).numpy()
    assert whole.dtype == np.float32
    assert whole.shape == (len(texts), len(scores.candidates))
    for i, query in enumerate(queries):
        assert scores.rows(np.array([query])).numpy().tobytes() == whole[i].tobytes()
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(scores, protocol=5, buffer_callback=buffers.append)
    # as Ray hands an object over: its arrays are read-only views of shared memory
    arrived = pickle.loads(sent, buffers=[bytes(buffer) for buffer in buffers])
    assert not arrived.query_weights.data.flags.writeable
    assert arrived.rows(queries).numpy().tobytes() == whole.tobytes()


@pytest.mark.parametrize("build", BUILDERS)
def test_equal_texts_score_equal(build):
    texts = many_texts()
    got = build(collection_of(texts), texts).rows(np.arange(len(texts))).numpy()
    assert got[:, 9].tobytes() == got[:, 10].tobytes()


def test_notes_and_dots_are_no_words():
    assert (
        without_words(["", " \n", NOTES, "...", "I", "7", "歌", "नमस्ते"]).tolist() == [True] * 4 + [False] * 4
    )


@pytest.mark.parametrize(
    ("module", "ask"),
    [
        ("sklearn.feature_extraction.text", lambda: tfidf_words(collection_of(TEXTS), TEXTS)),
        ("bm25s", lambda: bm25(collection_of(TEXTS), TEXTS)),
        ("sentence_transformers", lambda: sentence_vectors(TEXTS, "any")),
    ],
)
def test_an_absent_package_names_the_extra(monkeypatch, module, ask):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'wealy-ray\[text\]'"):
        ask()


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    return make_sentence_model(tmp_path_factory.mktemp("model"), TEXTS)


def test_sentence_vectors_are_means_of_states(sentence_model):
    from transformers import AutoModel, AutoTokenizer

    got = sentence_vectors(TEXTS, str(sentence_model))
    assert got.shape == (8, 32)
    assert got.dtype == np.float32
    tokenizer, bert = AutoTokenizer.from_pretrained(sentence_model), AutoModel.from_pretrained(sentence_model)
    for line, vector in zip(TEXTS, got, strict=True):
        states = bert(**tokenizer(line, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(vector, states[0].mean(0).detach().numpy(), atol=1e-5)
    scores = VectorScores.cosine(collection_of(TEXTS), got, without_words(TEXTS))
    rows = scores.rows(np.array([0, 5])).numpy()
    assert rows[0, :4].argmax() == 0
    assert rows[0, 0] == pytest.approx(1, abs=1e-5)
    assert (rows[0, [4, 5]] == -np.inf).all()
    assert (rows[1] == -np.inf).all()


def test_a_sentence_model_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        sentence_vectors(TEXTS, str(tmp_path / "empty"))
