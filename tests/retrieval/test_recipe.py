import pytest
from pydantic import ValidationError

from wealy_ray.retrieval.recipe import EvaluateRecipe

PARTS = ({"kind": "avg_embedding", "name": "a"}, {"kind": "bm25", "name": "b"})


def a_recipe(*fusions, **changes):
    systems = [
        *PARTS,
        *({"kind": "fusion", "name": f"f{i}", "of": ["a", "b"]} | f for i, f in enumerate(fusions)),
    ]
    settings = {"manifest": "m", "out": "o", "store": "s", "split": "test", "systems": systems}
    return EvaluateRecipe.model_validate(settings | changes)


@pytest.mark.parametrize(
    ("fusions", "changes", "message"),
    [
        (
            [{"weight": "tuned"}],
            {"tuning_split": "test"},
            "'f0' would be tuned on tracks that it is reported on",
        ),
        ([{"normalise": "learned"}], {"split": None}, "'f0' would be tuned on tracks that it is reported on"),
        ([{"weight": "tuned", "weights": []}], {}, "at least 1 item"),
        ([{}, {"of": ["f0", "b"], "weight": "tuned"}], {}, "'f1' cannot be tuned over another fusion, 'f0'"),
        ([{"of": ["a", "c"]}], {}, "no system further up is called 'c'"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_runs(fusions, changes, message):
    with pytest.raises(ValidationError, match=message):
        a_recipe(*fusions, **changes)


def test_tuning_on_what_is_reported_is_remembered():
    assert not a_recipe({"weight": "tuned"}).tunes_on_test
    assert not a_recipe({"weight": 2.0}, tuning_split="test", tune_on_test=True).tunes_on_test
    assert a_recipe({"weight": "tuned"}, tuning_split="test", tune_on_test=True).tunes_on_test
    assert a_recipe({"normalise": "learned"}, split=None, tune_on_test=True).tunes_on_test


def test_without_a_store_there_is_no_language_to_fuse_with():
    vectors = {"kind": "embeddings", "name": "e", "uri": "u"}
    fusion = {"kind": "fusion", "name": "f", "of": ["e", "same language"]}
    with pytest.raises(ValidationError, match="no system further up is called 'same language'"):
        a_recipe(store=None, systems=[vectors, fusion])
    assert a_recipe(systems=[vectors, fusion]).systems[1].of == ("e", "same language")
