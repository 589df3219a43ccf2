"""Releases: numbered, written once, the highest counts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from wealy_ray.errors import StoreError
from wealy_ray.storage import Storage
from wealy_ray.store import Release, newest_release, publish_release, released_embeddings

RELEASE = Release("manifest", "e1", 7, "model", "embedder", 3)


def test_the_highest_counts_and_the_same_is_not_released_twice(tmp_path: Path) -> None:
    storage, store = Storage(), str(tmp_path)
    assert newest_release(storage, store, "e1") is None
    assert publish_release(storage, store, RELEASE, "run-1") == 1
    assert publish_release(storage, store, RELEASE, "run-2") == 1
    other = replace(RELEASE, embedder_id="other")
    assert publish_release(storage, store, other, "run-3") == 2
    assert newest_release(storage, store, "e1") == (2, other)
    assert publish_release(storage, store, RELEASE, "run-4") == 3, "back to the first"
    assert newest_release(storage, store, "e1") == (3, RELEASE)
    (tmp_path / "releases" / "3.json").unlink()
    assert newest_release(storage, store, "e1") == (2, other)


def test_each_extractor_has_its_own(tmp_path: Path) -> None:
    storage, store = Storage(), str(tmp_path)
    publish_release(storage, store, RELEASE, "run-1")
    publish_release(storage, store, replace(RELEASE, extractor_id="e2"), "run-2")
    assert newest_release(storage, store, "e1") == (1, RELEASE)
    assert newest_release(storage, store, "e3") is None
    assert publish_release(storage, store, RELEASE, "run-3") == 1, "it counts still"


def test_many_at_a_time_take_a_number_each(tmp_path: Path) -> None:
    releases = [replace(RELEASE, embeddings_index=number) for number in range(16)]

    def publish(release: Release) -> int:
        return publish_release(Storage(), str(tmp_path), release, f"run-{release.embeddings_index}")

    with ThreadPoolExecutor(16) as pool:
        assert sorted(pool.map(publish, releases)) == list(range(1, 17))


@pytest.mark.parametrize("damage", ["", "{", '{"extractor_id": "e1"}', "[]"])
def test_a_damaged_one_is_a_sentence(tmp_path: Path, damage: str) -> None:
    storage, store = Storage(), str(tmp_path)
    publish_release(storage, store, RELEASE, "run-1")
    (tmp_path / "releases" / "2.json").write_text(damage)
    with pytest.raises(
        StoreError, match=r"releases/2\.json is damaged: remove it, and the one before it counts"
    ):
        newest_release(storage, store, "e1")
    with pytest.raises(StoreError, match=r"releases/2\.json is damaged"):
        publish_release(storage, store, replace(RELEASE, index=8), "run-2")


def test_vectors_that_are_gone_name_the_release(tmp_path: Path) -> None:
    storage, store = Storage(), str(tmp_path)
    assert released_embeddings(storage, store, "e1") is None
    publish_release(storage, store, RELEASE, "run-1")
    with pytest.raises(
        StoreError, match=r"no embeddings at .*; release 1 of .* names it: `wealy embed` makes another"
    ):
        released_embeddings(storage, store, "e1")
