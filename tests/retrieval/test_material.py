import numpy as np
import pyarrow as pa
import pytest

from wealy_ray.errors import ManifestError
from wealy_ray.retrieval.material import MATERIAL_SCHEMA, Material, collection_of
from wealy_ray.retrieval.recipe import EvaluateRecipe

ROWS = [
    # track, clique, split, kind, language of the manifest, language that was detected (None: no states)
    ("a0", "a", "test", "original", "en", "en"),
    ("a1", "a", "test", "cover", None, "es"),
    ("a2", "a", "test", "cover", "fr", None),
    ("b0", "b", "test", "original", None, "en"),
    ("b1", "b", "test", "live", None, "en"),
    ("c0", None, "test", "original", None, "en"),
    ("d0", "d", "val", "original", None, "en"),
]


def a_recipe(**changes):
    systems = [{"kind": "avg_embedding"}]
    settings = {"manifest": "m", "out": "o", "store": "s", "systems": systems, "split": "test"}
    return EvaluateRecipe.model_validate(settings | changes)


@pytest.fixture
def tables():
    names = ("track_id", "clique_id", "split", "kind", "language")
    manifest = pa.table({name: [row[i] for row in ROWS] for i, name in enumerate(names)})
    rows = [
        {"track_id": row[0], "text": f"text of {row[0]}", "language": row[5], "mean_all": [1.0, float(i)]}
        for i, row in enumerate(ROWS)
        if row[5] is not None
    ]
    empty = {"num_states": 1, "duration_s": 1.0, "no_speech": [0.0], "mean_text": None}
    return manifest, Material(
        pa.Table.from_pylist([empty | row for row in rows], schema=MATERIAL_SCHEMA),
        {row[0]: row[2] for row in ROWS},
    )


def ids(collection, places):
    return collection.track_ids[places].tolist()


def test_tracks_of_the_split_with_states(tables):
    collection = collection_of(a_recipe(), *tables, "test")
    assert ids(collection, collection.candidates) == ["a0", "a1", "b0", "b1", "c0"]
    assert ids(collection, collection.queries) == ["a0", "a1", "b0", "b1"]
    assert collection.languages.tolist() == ["en", "es", "en", "en", "en"]


def test_covers_against_originals(tables):
    recipe = a_recipe(query_kinds=["cover", "live"], candidate_kinds=["original"], without_states="rank_last")
    collection = collection_of(recipe, *tables, "test")
    assert ids(collection, collection.candidates) == ["a0", "b0", "c0"]
    assert ids(collection, collection.queries) == ["a1", "a2", "b1"]
    positives = collection.positives(collection.queries)
    assert positives.columns.tolist() == [0, 0, 1]
    assert collection.languages.tolist() == ["en", "es", "fr", "en", "en", "en"]


def test_nothing_to_ask_is_one_sentence(tables):
    with pytest.raises(ManifestError, match="has no query: no clique has two tracks here that have states"):
        collection_of(a_recipe(), *tables, "val")
    with pytest.raises(ManifestError, match="has no track of split 'train'; it has test, val"):
        collection_of(a_recipe(), *tables, "train")


def test_a_kind_that_nobody_has_is_named(tables):
    manifest, material = tables
    with pytest.raises(ManifestError, match="no track of kind 'covers'; it has cover, live, original"):
        collection_of(a_recipe(query_kinds=["covers"]), manifest, material, "test")
    nameless = manifest.set_column(3, "kind", pa.nulls(len(manifest), pa.string()))
    with pytest.raises(ManifestError, match="no track of kind 'original'; it names no kinds"):
        collection_of(a_recipe(candidate_kinds=["original"]), nameless, material, "test")


def test_means_and_what_is_missing(tables):
    _, material = tables
    vectors, missing = material.means(["b1", "a2", "a0"], "all")
    np.testing.assert_array_equal(vectors, [[1, 4], [0, 0], [1, 0]])
    assert missing.tolist() == [False, True, False]
    vectors, missing = material.means(["b1"], "text")
    assert missing.all()
    assert vectors.shape == (1, 0)
