import numpy as np
import pyarrow as pa
import pytest

from wealy_ray.errors import ConfigError, StoreError
from wealy_ray.retrieval.approximate import ApproximateIndex
from wealy_ray.retrieval.material import MATERIAL_SCHEMA
from wealy_ray.retrieval.search import BY, find_nearest, shared_lyrics

TEXTS = {
    "a1": "oh the river runs to the sea tonight",
    "a2": "the river runs, to the SEA! oh my",
    "b1": "diamonds in the window of a train",
    "b2": "a train, diamonds everywhere",
    "quiet": "",
}


@pytest.fixture
def material():
    centres = {"a": [1.0, 0, 0], "b": [0, 1.0, 0], "q": [0, 0, 1.0]}
    rows = [
        {
            "track_id": t,
            "text": text,
            "language": "en",
            "num_states": 3,
            "duration_s": 9.0,
            "no_speech": [0.1],
        }
        | {"mean_all": (np.array(centres[t[0]]) + 0.05 * i).tolist(), "mean_text": None}
        for i, (t, text) in enumerate(TEXTS.items())
    ]
    return pa.Table.from_pylist(rows, schema=MATERIAL_SCHEMA)


def row_of(material, track_id):
    return next(r for r in material.to_pylist() if r["track_id"] == track_id)


@pytest.mark.parametrize("by", [by for by in BY if by != "embedding"])
def test_a_track_finds_its_version_and_not_itself(material, by):
    for asked, wanted in (("a1", "a2"), ("a2", "a1"), ("b1", "b2"), ("b2", "b1")):
        found = find_nearest(material, row_of(material, asked), by, top=3)
        assert [f.rank for f in found] == list(range(1, len(found) + 1))
        assert found[0].track_id == wanted
        assert asked not in [f.track_id for f in found]
        assert found[0].language == "en"
        assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
    if by != "avg_embedding":
        assert "quiet" not in [f.track_id for f in found]  # it has nothing that could be compared


def test_a_text_is_found_with_the_passages_that_match(material):
    query = dict.fromkeys(MATERIAL_SCHEMA.names) | {
        "track_id": "?",
        "text": "RIVER runs to the sea, and diamonds",
    }
    found = find_nearest(material, query, "tfidf_words", top=2)
    assert [f.track_id for f in found] == ["a2", "a1"] or [f.track_id for f in found] == ["a1", "a2"]
    lyrics = {f.track_id: f.lyrics for f in found}
    assert lyrics["a1"] == ("river runs to the sea",)
    assert lyrics["a2"] == ("river runs, to the SEA",)


def test_what_cannot_be_compared_is_said(material):
    text = dict.fromkeys(MATERIAL_SCHEMA.names) | {"track_id": "?", "text": "river"}
    with pytest.raises(ConfigError, match="the query has no states"):
        find_nearest(material, text, "avg_embedding", top=1)
    with pytest.raises(ConfigError, match="the query has no words that could be compared by bm25"):
        find_nearest(material, row_of(material, "quiet"), "bm25", top=1)


def test_shared_lyrics():
    assert shared_lyrics("la la la", "") == ()
    assert shared_lyrics("one two three", "three two one") == ()  # single words are no passage
    assert shared_lyrics("we sing\nall night", "You: we  SING all, night!") == ("we SING all, night",)
    long_first = shared_lyrics("a b c x d e", "d e y a b c")
    assert long_first[0] == "a b c"
    # where there are no spaces, characters count
    line = "\u541b\u306e\u540d\u306f\u5fd8\u308c\u306a\u3044\u3088"
    assert shared_lyrics(line * 3, "\u3042" + line + "\u3042" * 15) == (line,)


def test_the_approximate_index_finds_what_its_recall_says(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((300, 32))
    vectors = (centres[np.arange(3000) % 300] + 0.5 * rng.standard_normal((3000, 32))).astype(np.float32)
    ids = [f"t{i:04d}" for i in rng.permutation(3000)]
    index = ApproximateIndex.build(tmp_path / "ann", ids, vectors)
    assert index.num_asked == 500
    assert 0.9 < index.recall <= 1
    again = ApproximateIndex.open(tmp_path / "ann")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    hits = 0
    for i in range(0, 3000, 30):
        cosines = unit @ unit[i]
        exact = np.argsort(-cosines)[:10]
        found = again.nearest(vectors[i] * 3, 10)
        assert found[0][0] == ids[i]
        assert found[0][1] == pytest.approx(1, abs=1e-5)
        assert dict(found)[found[4][0]] == pytest.approx(cosines[ids.index(found[4][0])], abs=1e-5)
        hits += len({ids[j] for j in exact} & {t for t, _ in found})
    assert hits / 1000 == pytest.approx(index.recall, abs=0.05)


def test_a_damaged_approximate_index_is_named(tmp_path):
    vectors = np.random.default_rng(1).standard_normal((20, 8)).astype(np.float32)
    ApproximateIndex.build(tmp_path / "ann", [f"t{i}" for i in range(20)], vectors)
    (tmp_path / "ann" / "facts.json").write_text("{")
    with pytest.raises(StoreError, match="holds no approximate index"):
        ApproximateIndex.open(tmp_path / "ann")
