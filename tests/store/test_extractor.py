from __future__ import annotations

from dataclasses import replace

import pytest

from wealy_ray.errors import StoreError
from wealy_ray.storage import Storage
from wealy_ray.store import ExtractorSpec, list_extractors

SPEC = ExtractorSpec(
    weights_digest="abc",
    max_duration_s=300.0,
    windows={"plan": "fixed", "hop_s": 25.0},
    decode={"language": None, "task": "transcribe", "timestamps": False, "max_tokens": 224},
)


def test_the_id_depends_on_every_setting_and_on_nothing_else() -> None:
    changed = [
        replace(SPEC, weights_digest="abd"),
        replace(SPEC, max_duration_s=299.5),
        replace(SPEC, windows={"plan": "fixed", "hop_s": 20.0}),
        replace(SPEC, decode={**SPEC.decode, "language": "pt"}),
        replace(SPEC, resampler="soxr"),
        replace(SPEC, numerics_version=2),
    ]
    assert len({s.extractor_id for s in [SPEC, *changed]}) == len(changed) + 1
    same = replace(SPEC, max_duration_s=300, windows={"hop_s": 25, "plan": "fixed"})
    assert same.extractor_id == SPEC.extractor_id
    # golden: an id that moves would orphan every store
    assert SPEC.extractor_id == "afadfa61a2c01df2"


def test_ensure_writes_once_and_compares(place: tuple[Storage, str]) -> None:
    storage, root = place
    assert list_extractors(storage, root) == {}
    assert SPEC.ensure(storage, root) == f"{root}/{SPEC.extractor_id}"
    SPEC.ensure(storage, root)
    other = replace(SPEC, numerics_version=2)
    other.ensure(storage, root)
    found = list_extractors(storage, root)
    assert set(found) == {SPEC.extractor_id, other.extractor_id}
    assert found[SPEC.extractor_id]["windows"] == {"plan": "fixed", "hop_s": 25}


@pytest.mark.parametrize("content", [b"{}", b"no json", b'{"weights_digest": "other"}'])
def test_a_changed_description_is_refused(storage: Storage, root: str, content: bytes) -> None:
    storage.write(f"{SPEC.root(root)}/extractor.json", content)
    with pytest.raises(StoreError, match=r"extractor.json does not describe"):
        SPEC.ensure(storage, root)
