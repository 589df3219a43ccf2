from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from tests.store.tracks import flip, make_failed, make_track, manifest_of, write
from wealy_ray.errors import FencedError, StoreError
from wealy_ray.storage import Storage
from wealy_ray.store import INDEX_SCHEMA, IndexWriter, adopt, one_per_track, read_index, read_latest
from wealy_ray.store.index import index_uri, list_numbers


def claim(storage: Storage, root: str, run_id: str = "run") -> IndexWriter:
    return IndexWriter.claim(storage, root, manifest_digest="digest", run_id=run_id)


def test_claim_then_publish(place: tuple[Storage, str]) -> None:
    storage, root = place
    assert read_latest(storage, root) is None
    first = claim(storage, root, "one")
    assert (first.index.number, first.epoch, first.index.counts()) == (1, 1, {"ok": 0, "failed": 0})
    first.publish(write(storage, root, [make_track(2), make_failed(0)]))
    first.publish(write(storage, root, [make_track(1)]))

    index = read_latest(storage, root)
    assert index is not None
    assert index.table.equals(first.index.table)
    assert (index.number, index.epoch, index.counts()) == (3, 1, {"ok": 2, "failed": 1})
    assert index.table["track_id"].to_pylist() == ["set:V-0", "set:V-1", "set:V-2"]
    names = ("parent", "run_id", "manifest_digest", "ok", "failed")
    assert [index.metadata[n] for n in names] == ["2", "one", "digest", "2", "1"]

    second = claim(storage, root, "two")
    assert (second.index.number, second.epoch) == (4, 4)
    assert second.index.table.equals(index.table)
    assert read_index(storage, root, 2).counts() == {"ok": 1, "failed": 1}


def test_a_zombie_is_fenced_and_loses_nothing(place: tuple[Storage, str]) -> None:
    storage, root = place
    zombie = claim(storage, root, "zombie")
    zombie.publish(write(storage, root, [make_track(0)]))
    late = write(storage, root, [make_track(1)])
    heir = claim(storage, root, "heir")
    for _ in range(2):  # it stays fenced
        with pytest.raises(FencedError, match="another driver has claimed this store") as caught:
            zombie.publish(late)
    assert caught.value.exit_code == 7
    found = adopt(
        storage,
        root,
        heir.index,
        manifest_of([0, 1]),
        extractor_id=root.rsplit("/", 1)[-1],
        adopt_failed=True,
    )
    assert heir.publish(found.rows).counts() == {"ok": 2, "failed": 0}


def test_of_sixteen_claims_at_once_one_wins(place: tuple[Storage, str]) -> None:
    storage, root = place
    storage.exists(root)
    gate = threading.Barrier(16)

    def race(number: int) -> int:
        gate.wait()
        try:
            writer = claim(storage, root, f"run-{number}")
        except FencedError:
            return 0
        # a late thread may claim after the winner, fairly: at most one writer holds the last number
        return writer.epoch

    with ThreadPoolExecutor(16) as pool:
        epochs = [e for e in pool.map(race, range(16)) if e]
    assert sorted(epochs) == list_numbers(storage, root) == list(range(1, len(epochs) + 1))


def test_of_sixteen_publishes_of_one_number_one_wins(place: tuple[Storage, str]) -> None:
    storage, root = place
    claim(storage, root)
    writers = [claim(storage, root, f"run-{i}") for i in range(16)]
    for writer in writers:  # as if all had read the store at the same moment
        writer.index = writers[-1].index
    rows = INDEX_SCHEMA.empty_table()
    gate = threading.Barrier(16)

    def race(writer: IndexWriter) -> bool:
        gate.wait()
        try:
            writer.publish(rows)
        except FencedError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        wins = list(pool.map(race, writers))
    assert sum(wins) == 1
    latest = read_latest(storage, root)
    assert latest is not None
    assert latest.metadata["run_id"] == f"run-{wins.index(True)}"


def test_new_rows_replace_old_ones(storage: Storage, root: str) -> None:
    writer = claim(storage, root)
    writer.publish(write(storage, root, [make_failed(0), make_track(1)]))
    index = writer.publish(write(storage, root, [make_track(0, audio_etag="new")]))
    assert index.counts() == {"ok": 2, "failed": 0}
    row = index.row("set:V-0")
    assert row is not None
    assert row["audio_etag"] == "new"


def test_of_doubled_rows_ok_wins_then_the_lowest_shard(storage: Storage, root: str) -> None:
    receipts = [
        write(storage, root, [t]) for t in (make_track(0), make_track(0), make_failed(0), make_track(7))
    ]
    rows = pa.concat_tables(receipts)
    lowest = min(r["shard"][0].as_py() for r in receipts[:2])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        found = one_per_track(rows.take(order))
        assert found["track_id"].to_pylist() == ["set:V-0", "set:V-7"]
        assert (found["shard"][0].as_py(), found["status"][0].as_py()) == (lowest, "ok")


def test_lookups_against_a_loop(storage: Storage, root: str) -> None:
    numbers = [5, 10, 100, 1, 9, 99]
    odd = make_track(3, track_id="\u00e9t\u00e9:\U0001f3b5")
    index = claim(storage, root).publish(write(storage, root, [*map(make_track, numbers), odd]))
    ids = index.table["track_id"].to_pylist()
    assert ids == sorted(ids)
    for track_id in [*ids, "", "set:V-0", "zzz", "\u00e9"]:
        expected = ids.index(track_id) if track_id in ids else None
        assert index.find(track_id) == expected
        assert (track_id in index) == (expected is not None)
    assert index.positions(pa.array([ids[2], "none", ids[0]])).to_pylist() == [2, None, 0]


def test_numbers_are_sorted_as_numbers_and_strangers_ignored(storage: Storage, root: str) -> None:
    writer = claim(storage, root)
    for _ in range(10):
        writer.publish(INDEX_SCHEMA.empty_table())
    for name in ("99.parquet.damaged", "x.parquet", "012.parquet", ".tmp-0123", "notes.txt"):
        storage.write(f"{root}/index/{name}", b"?")
    assert list_numbers(storage, root) == list(range(1, 12))
    latest = read_latest(storage, root)
    assert latest is not None
    assert latest.number == 11


@pytest.mark.parametrize("how", ["truncated", "flipped", "text", "empty", "renamed"])
def test_a_damaged_index_is_named_with_its_remedy(storage: Storage, root: str, how: str) -> None:
    writer = claim(storage, root)
    writer.publish(write(storage, root, [make_track(i) for i in range(20)]))
    uri = index_uri(root, 2)
    data = storage.read(uri)
    damaged = {
        "truncated": data[: len(data) // 2],
        "flipped": flip(data, 300),
        "text": b"no index",
        "empty": b"",
        "renamed": storage.read(index_uri(root, 1)),
    }[how]
    storage.write(uri, damaged)
    with pytest.raises(StoreError, match=r"index/2.parquet is damaged .*rename it.*delete nothing"):
        read_latest(storage, root)
    # the remedy works: nothing is lost
    storage.write(f"{uri}.damaged", storage.read(uri))
    storage.delete(uri)
    heir = claim(storage, root)
    found = adopt(
        storage, root, heir.index, manifest_of(range(20)), extractor_id="0123456789abcdef", adopt_failed=True
    )
    assert heir.publish(found.rows).counts() == {"ok": 20, "failed": 0}


def test_pandas_polars_and_duckdb_read_an_index_as_it_is(storage: Storage, root: str) -> None:
    writer = claim(storage, root)
    index = writer.publish(write(storage, root, [make_track(0), make_failed(1), make_track(2)]))
    uri, expected = index_uri(root, 2), index.table.to_pylist()
    offsets, runs = [r["payload_offset"] for r in expected], [r["kind_runs"] for r in expected]
    frame = pd.read_parquet(uri)
    assert frame["payload_offset"].tolist() == offsets
    assert [r.tolist() for r in frame["kind_runs"]] == runs
    assert pl.read_parquet(uri).to_dicts() == expected
    rows = duckdb.sql(f"select payload_offset, kind_runs from '{uri}' order by track_id").fetchall()
    assert rows == list(zip(offsets, runs, strict=True))


def test_a_missing_number_is_a_store_error(storage: Storage, root: str) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        read_index(storage, root, 3)
