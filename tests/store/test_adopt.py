from __future__ import annotations

from typing import Any

import pyarrow as pa

from tests.store.tracks import (
    EXTRACTOR_ID,
    CountingStorage,
    damage,
    flip,
    make_failed,
    make_track,
    manifest_of,
    shard_of,
    write,
)
from wealy_ray.storage import Storage
from wealy_ray.store import Adoption, IndexWriter, adopt


def run(storage: Storage, root: str, wanted: pa.Table, index: Any = None, **changes: Any) -> Adoption:
    values = {"extractor_id": EXTRACTOR_ID, "adopt_failed": True, **changes}
    return adopt(storage, root, index, wanted, **values)


def ids(found: Adoption) -> list[str]:
    return found.rows["track_id"].to_pylist()


def test_shards_that_no_index_names_are_adopted(place: tuple[Storage, str]) -> None:
    storage, root = place
    assert run(storage, root, manifest_of([0])).rows.num_rows == 0  # before anything was written
    writer = IndexWriter.claim(storage, root, manifest_digest="d", run_id="r")
    writer.publish(write(storage, root, [make_track(0), make_track(1)]))
    lost = write(storage, root, [make_track(2), make_failed(3), make_track(4)])
    found = run(storage, root, manifest_of([2, 3, 9]), writer.index)
    assert found.rows.equals(lost.slice(0, 2))
    assert found.refused == []
    assert writer.publish(found.rows).counts() == {"ok": 3, "failed": 1}


def test_shards_named_by_the_index_are_not_read(storage: CountingStorage, root: str) -> None:
    writer = IndexWriter.claim(storage, root, manifest_digest="d", run_id="r")
    writer.publish(write(storage, root, [make_track(0)]))
    storage.reads.clear()
    assert ids(run(storage, root, manifest_of([0]), writer.index)) == []
    assert storage.reads == []


def test_of_doubled_tracks_the_lowest_shard_name_wins(storage: Storage, root: str) -> None:
    names = [shard_of(write(storage, root, [make_track(0), make_track(i + 1)])) for i in range(6)]
    found = run(storage, root, manifest_of(range(7)))
    assert ids(found) == [f"set:V-{i}" for i in range(7)]
    assert found.rows["shard"][0].as_py() == min(names)


def test_failed_rows_are_adopted_only_on_request(storage: Storage, root: str) -> None:
    write(storage, root, [make_failed(0), make_track(1)])
    assert ids(run(storage, root, manifest_of([0, 1]))) == ["set:V-0", "set:V-1"]
    assert ids(run(storage, root, manifest_of([0, 1]), adopt_failed=False)) == ["set:V-1"]


def test_changed_audio_is_not_adopted(storage: Storage, root: str) -> None:
    write(storage, root, [make_track(0, audio_etag="old", manifest_etag=None), make_track(1)])
    assert ids(run(storage, root, manifest_of([0, 1]))) == ["set:V-1"]
    assert ids(run(storage, root, manifest_of([0, 1], etags=False))) == ["set:V-0", "set:V-1"]


def test_damaged_and_foreign_shards_are_refused_with_a_reason(storage: Storage, root: str) -> None:
    receipts = [write(storage, root, [make_track(i), make_track(i + 10)]) for i in range(4)]
    names = [shard_of(r) for r in receipts]
    damage(storage, root, names[0], lambda data: data[:-20])
    damage(storage, root, names[1], lambda data: flip(data, receipts[1]["payload_offset"][1].as_py()))
    damage(storage, root, names[2], lambda _: b"text")
    foreign = shard_of(write(storage, root, [make_track(5)], extractor_id="f" * 16))
    storage.write(f"{root}/shards/README.txt", b"hello")
    found = run(storage, root, manifest_of(range(20)))
    assert ids(found) == ["set:V-13", "set:V-3"]
    reasons = dict(found.refused)
    assert set(reasons) == {*names[:3], foreign, "README.txt"}
    assert "set:V-11" in reasons[names[1]]
    assert "belongs to extractor" in reasons[foreign]


def test_a_half_written_file_of_a_dead_writer_is_no_shard(storage: Storage, root: str) -> None:
    storage.write(f"{root}/shards/.tmp-0123", b"half")
    found = run(storage, root, manifest_of([0]))
    assert (found.rows.num_rows, found.refused) == (0, [])


def test_a_track_wanted_by_many_shards_is_verified_where_it_lies(storage: CountingStorage, root: str) -> None:
    write(storage, root, [make_track(i, 100, 32) for i in range(5)])
    storage.reads.clear()
    run(storage, root, manifest_of([3]))
    lengths = [length for _, _, _, length in storage.reads]
    assert lengths[1:] == [100 * 32 * 2]  # the tail, and the payload of the one wanted track
