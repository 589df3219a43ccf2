from __future__ import annotations

import json
from collections.abc import Callable

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store.tracks import (
    EXTRACTOR_ID,
    CountingStorage,
    assert_same,
    damage,
    flip,
    make_failed,
    make_track,
    shard_of,
    write,
)
from wealy_ray.errors import StoreError
from wealy_ray.storage import Storage
from wealy_ray.store import SHARD_SCHEMA, TrackStates, read_receipt, verify_shard
from wealy_ray.store.schema import kinds_of, runs_of
from wealy_ray.store.shard import TAIL_BYTES, read_row, shard_uri


def test_what_is_written_is_read(place: tuple[Storage, str]) -> None:
    storage, root = place
    tracks = [make_track(0), make_failed(1), make_track(2, num_states=0), make_track(3, 300, 64)]
    receipt = write(storage, root, tracks)
    name = shard_of(receipt)
    assert read_receipt(storage, root, name).equals(receipt)
    verify_shard(storage, root, name)
    for row, track in zip(receipt.to_pylist(), tracks, strict=True):
        back = TrackStates.from_row(read_row(storage, root, name, row["shard_bytes"], row["row"]))
        assert_same(track, back)
        np.testing.assert_array_equal(kinds_of(row["kind_runs"]), track.kind)


SIZES = st.tuples(st.integers(0, 400), st.sampled_from([1, 2, 3, 8, 64, 127, 384]))


@settings(max_examples=60, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=8))
def test_payload_lies_at_its_offset(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]]
) -> None:
    _check_offsets(str(tmp_path_factory.mktemp("offsets")), sizes)


def test_payload_lies_at_its_offset_for_real_sizes(root: str) -> None:
    _check_offsets(root, [(3000, 1280), (0, 1280), (1, 1), (2240, 512), (224 * 12, 1280)])


def _check_offsets(root: str, sizes: list[tuple[int, int]]) -> None:
    storage = Storage()
    tracks = [make_track(i, n, dim) for i, (n, dim) in enumerate(sizes)]
    receipt = write(storage, root, tracks)
    with open(shard_uri(root, shard_of(receipt)), "rb") as f:
        data = f.read()
    for row, track in zip(receipt.to_pylist(), tracks, strict=True):
        begin = row["payload_offset"]
        assert data[begin : begin + track.states.nbytes] == track.states.tobytes()
        assert row["shard_bytes"] == len(data)


def test_states_in_another_memory_layout_are_stored_row_major(storage: Storage, root: str) -> None:
    states = np.asfortranarray(make_track(0).states)
    row = write(storage, root, [make_track(0, states=states)]).to_pylist()[0]
    back = TrackStates.from_row(read_row(storage, root, row["shard"], row["shard_bytes"], 0))
    np.testing.assert_array_equal(back.states, states)


def test_a_stray_surrogate_in_a_message_costs_nothing(storage: Storage, root: str) -> None:
    receipt = write(storage, root, [make_track(0, text="a\ud800b", warnings=("\udcff",))])
    row = receipt.to_pylist()[0]
    assert TrackStates.from_row(read_row(storage, root, row["shard"], row["shard_bytes"], 0)).text == "a?b"


def test_runs_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 50):
        kind = rng.integers(0, 3, length).astype(np.int8)
        expected: list[int] = []
        for k in kind.tolist():
            if expected and expected[-2] == k:
                expected[-1] += 1
            else:
                expected += [k, 1]
        assert runs_of(kind) == expected
        np.testing.assert_array_equal(kinds_of(expected), kind)


@pytest.fixture
def shard(storage: CountingStorage, root: str) -> tuple[str, list[TrackStates]]:
    tracks = [make_track(0, 40, 16), make_failed(1), make_track(2, 30, 16)]
    return shard_uri(root, shard_of(write(storage, root, tracks))), tracks


def test_pandas_reads_a_shard_as_it_is(shard: tuple[str, list[TrackStates]]) -> None:
    uri, tracks = shard
    frame = pd.read_parquet(uri)
    assert frame["track_id"].tolist() == [t.track_id for t in tracks]
    for row, track in zip(frame.itertuples(), tracks, strict=True):
        states = np.frombuffer(row.states, np.float16).reshape(row.num_states, row.dim)
        np.testing.assert_array_equal(states, track.states)
        np.testing.assert_array_equal(row.token_ids, track.token_ids)
        np.testing.assert_array_equal(row.kind, track.kind)
        assert [w["text"] for w in row.windows] == [w.text for w in track.windows]


def test_polars_reads_a_shard_as_it_is(shard: tuple[str, list[TrackStates]]) -> None:
    uri, tracks = shard
    frame = pl.read_parquet(uri)
    for row, track in zip(frame.iter_rows(named=True), tracks, strict=True):
        assert row["states"] == track.states.tobytes()
        assert row["window"] == track.window.tolist()
        assert [w["start_s"] for w in row["windows"]] == [w.start_s for w in track.windows]
        assert (row["text"], row["status"], row["error_type"]) == (track.text, track.status, track.error_type)


def test_duckdb_reads_a_shard_as_it_is(shard: tuple[str, list[TrackStates]]) -> None:
    uri, tracks = shard
    query = f"select track_id, states, kind, windows[1].text, warnings from '{uri}' where status = 'ok'"
    rows = duckdb.sql(query).fetchall()
    for (track_id, states, kind, text, warnings), track in zip(rows, [tracks[0], tracks[2]], strict=True):
        assert (track_id, states, kind) == (track.track_id, track.states.tobytes(), track.kind.tolist())
        assert (text, tuple(warnings)) == (track.windows[0].text, track.warnings)


def test_a_shard_says_where_it_comes_from(shard: tuple[str, list[TrackStates]]) -> None:
    file = pq.ParquetFile(shard[0])
    assert file.schema_arrow.remove_metadata().equals(SHARD_SCHEMA)
    assert file.num_row_groups == len(shard[1])
    found = file.metadata.metadata
    assert (found[b"extractor_id"], found[b"epoch"]) == (EXTRACTOR_ID.encode(), b"1")
    assert json.loads(found[b"numerics"]) == {"device": "cpu", "dtype": "float32"}


def test_a_receipt_costs_one_read_of_the_tail(storage: CountingStorage, root: str) -> None:
    receipt = write(storage, root, [make_track(i, 1500, 128) for i in range(4)])
    storage.reads.clear()
    read_receipt(storage, root, shard_of(receipt))
    assert [(kind, length) for kind, _, _, length in storage.reads] == [("read_range", TAIL_BYTES)]


def test_a_receipt_longer_than_the_first_guess(storage: CountingStorage, root: str) -> None:
    long_uri = "s3://audio/" + "x" * 200_000
    receipt = write(storage, root, [make_track(i, audio_uri=long_uri) for i in range(2)])
    storage.reads.clear()
    assert read_receipt(storage, root, shard_of(receipt)).equals(receipt)
    assert len(storage.reads) == 2


def test_doubled_tracks_and_empty_shards_are_defects(storage: Storage, root: str) -> None:
    with pytest.raises(AssertionError, match="twice"):
        write(storage, root, [make_track(0), make_track(0)])
    with pytest.raises(AssertionError, match="empty"):
        write(storage, root, [])


def test_truncated_anywhere_is_refused(storage: Storage, root: str) -> None:
    receipt = write(storage, root, [make_track(i) for i in range(3)])
    name = shard_of(receipt)
    whole = storage.read(shard_uri(root, name))
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    places = [0, 1, 4, 11, 12, *np.linspace(13, footer - 1, 20, dtype=int), footer, footer + 100]
    places += [len(whole) - 9, len(whole) - 8, len(whole) - 4, len(whole) - 1]
    for place in places:
        storage.write(shard_uri(root, name), whole[:place])
        with pytest.raises(StoreError, match=r"truncated|damaged") as caught:
            read_receipt(storage, root, name)
        assert name in str(caught.value)


def test_a_flipped_byte_anywhere_is_noticed_or_harmless(storage: Storage, root: str) -> None:
    tracks = [make_track(i, 40, 16) for i in range(2)]
    receipt = write(storage, root, tracks)
    name, size = shard_of(receipt), receipt["shard_bytes"][0].as_py()
    whole = storage.read(shard_uri(root, name))
    num_refused = 0
    for place in range(0, len(whole), 37):
        storage.write(shard_uri(root, name), flip(whole, place))
        try:
            assert read_receipt(storage, root, name).equals(receipt)
            verify_shard(storage, root, name)
            for row, track in enumerate(tracks):
                assert_same(track, TrackStates.from_row(read_row(storage, root, name, size, row)))
        except StoreError:
            num_refused += 1
    assert num_refused > len(whole) // 37 // 2


def test_a_flipped_byte_in_a_payload_names_shard_and_track(storage: Storage, root: str) -> None:
    receipt = write(storage, root, [make_track(i) for i in range(3)])
    name = shard_of(receipt)
    damage(storage, root, name, lambda data: flip(data, receipt["payload_offset"][1].as_py() + 5))
    with pytest.raises(StoreError, match=rf"{name}.*set:V-1"):
        verify_shard(storage, root, name)
    verify_shard(storage, root, name, receipt.take([0, 2]))


PLAIN = pa.BufferOutputStream()
pq.write_table(pa.table({"a": [1]}), PLAIN)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda _: b"just text\n" * 10, "truncated or no shard"),
        (lambda _: b"", "truncated or no shard"),
        (lambda _: PLAIN.getvalue().to_pybytes(), "no valid checksum"),
        (lambda data: data[:-8] + (2**31).to_bytes(4, "little") + b"PAR1", "footer claims|no valid"),
    ],
)
def test_what_is_no_shard_is_refused(
    storage: Storage, root: str, change: Callable[[bytes], bytes], why: str
) -> None:
    name = shard_of(write(storage, root, [make_track(0)]))
    damage(storage, root, name, change)
    with pytest.raises(StoreError, match=why):
        read_receipt(storage, root, name)


def test_shards_of_another_extractor_are_refused(storage: Storage, root: str) -> None:
    name = shard_of(write(storage, root, [make_track(0)], extractor_id="f" * 16))
    with pytest.raises(StoreError, match=f"belongs to extractor {'f' * 16}, not to {EXTRACTOR_ID}"):
        read_receipt(storage, root, name)


def test_a_missing_shard_is_a_store_error(storage: Storage, root: str) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        read_receipt(storage, root, "none.parquet")
