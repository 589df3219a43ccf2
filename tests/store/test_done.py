from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.store.tracks import make_failed, make_track, manifest_of, write
from wealy_ray.storage import Storage
from wealy_ray.store import Index, IndexWriter, split_work


@pytest.fixture
def index(storage: Storage, root: str) -> Index:
    tracks = [
        make_track(0),
        make_track(1, audio_etag="seen", manifest_etag="asked"),
        make_track(2, audio_etag="seen", manifest_etag=None),
        make_track(3, audio_etag=None, manifest_etag=None),
        make_failed(4),
    ]
    writer = IndexWriter.claim(storage, root, manifest_digest="d", run_id="r")
    return writer.publish(write(storage, root, tracks))


def slow_rule(track: dict[str, Any], row: dict[str, Any] | None, retry_failed: bool) -> bool:
    if row is None or (retry_failed and row["status"] == "failed"):
        return False
    if track["etag"] is None:
        return track["audio_uri"] == row["audio_uri"]
    return track["etag"] in (row["audio_etag"], row["manifest_etag"])


@pytest.mark.parametrize("retry_failed", [False, True])
def test_the_rule_against_a_loop(index: Index, retry_failed: bool) -> None:
    tracks = [
        {"track_id": f"set:V-{n}", "audio_uri": uri, "etag": etag}
        for n in range(7)
        for uri in (f"s3://audio/{n}.mp3", "s3://elsewhere/x.mp3")
        for etag in (None, "seen", "asked", "etag-0", "etag-4", "")
    ]
    manifest = pa.Table.from_pylist(tracks)
    found = split_work(manifest, index, retry_failed=retry_failed)
    expected = [slow_rule(t, index.row(t["track_id"]), retry_failed) for t in tracks]
    np.testing.assert_array_equal(found, expected)
    assert 0 < found.sum() < len(tracks)


def test_a_manifest_without_etags_goes_by_uri(index: Index) -> None:
    manifest = manifest_of(range(6)).select(["track_id", "audio_uri"])
    assert split_work(manifest, index).tolist() == [True] * 5 + [False]
    assert split_work(manifest_of(range(3), etags=False), index).all()


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_manifests_of_other_string_types(index: Index, kind: pa.DataType) -> None:
    plain = manifest_of(range(6))
    manifest = plain.cast(pa.schema([(name, kind) for name in plain.column_names]))
    assert split_work(manifest, index).tolist() == split_work(plain, index).tolist()


def test_nothing_is_done_without_an_index(index: Index) -> None:
    assert not split_work(manifest_of(range(3)), None).any()
    assert split_work(manifest_of([]), index).shape == (0,)
    empty = Index(1, 1, index.table.slice(0, 0), {})
    assert split_work(manifest_of(range(3)), empty).tolist() == [False] * 3
