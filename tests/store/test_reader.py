from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from tests.store.test_extractor import SPEC
from tests.store.tracks import (
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
from wealy_ray.store import IndexWriter, StoreReader, TrackStates
from wealy_ray.store.shard import shard_uri

TRACKS = [make_track(0, 200, 24), make_failed(1), make_track(2, 0, 24), make_track(3, 50, 24)]


def build(storage: Storage, store: str) -> str:
    """A store of two shards; returns its root."""
    root = SPEC.ensure(storage, store)
    writer = IndexWriter.claim(storage, root, manifest_digest="d", run_id="r")
    for tracks in (TRACKS[:2], TRACKS[2:]):
        writer.publish(write(storage, root, tracks, extractor_id=SPEC.extractor_id))
    return root


@pytest.fixture
def reader(storage: CountingStorage, root: str) -> StoreReader:
    build(storage, root)
    return StoreReader.open(storage, root)


def test_everything_is_found_again(place: tuple[Storage, str]) -> None:
    storage, store = place
    build(storage, store)
    reader = StoreReader.open(storage, store)
    for track in TRACKS:
        assert_same(track, reader.track(track.track_id))
        if track.status == "ok":
            np.testing.assert_array_equal(reader.states(track.track_id), track.states)
            np.testing.assert_array_equal(reader.kinds(track.track_id), track.kind)
    np.testing.assert_array_equal(reader.states("set:V-3", 7, 20), TRACKS[3].states[7:20])
    assert reader.failures()["track_id"].to_pylist() == ["set:V-1"]


@pytest.mark.parametrize(
    "crop", [(0, 1), (199, 200), (13, 57), (150, None), (0, 500), (-20, None), (-20, -3)]
)
def test_a_crop_reads_exactly_its_bytes(
    storage: CountingStorage, root: str, crop: tuple[int, int | None]
) -> None:
    reader = _open(storage, root)
    expected = TRACKS[0].states[slice(*crop)]
    storage.reads.clear()
    found = reader.states("set:V-0", *crop)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float16
    assert [(kind, length) for kind, _, _, length in storage.reads] == [("read_range", expected.nbytes)]


@pytest.mark.parametrize("crop", [(5, 5), (10, 3), (300, 400)])
def test_an_empty_crop_is_an_empty_slice(reader: StoreReader, crop: tuple[int, int]) -> None:
    assert reader.states("set:V-0", *crop).shape == (0, 24)


def _open(storage: Storage, store: str) -> StoreReader:
    build(storage, store)
    return StoreReader.open(storage, store)


def test_a_track_without_states_keeps_its_width(reader: StoreReader) -> None:
    assert reader.states("set:V-2").shape == (0, 24)
    assert reader.track("set:V-2").states.shape == (0, 24)


def test_a_whole_row_costs_two_reads(storage: CountingStorage, reader: StoreReader) -> None:
    storage.reads.clear()
    reader.track("set:V-3")
    assert [kind for kind, *_ in storage.reads] == ["read_range"] * 2


def test_an_older_snapshot_can_be_opened(storage: Storage, root: str) -> None:
    build(storage, root)
    older = StoreReader.open(storage, root, index_number=2)
    assert older.index.table["track_id"].to_pylist() == ["set:V-0", "set:V-1"]
    with pytest.raises(StoreError, match=r"index/9.parquet does not exist"):
        StoreReader.open(storage, root, index_number=9)


def test_a_reader_travels_to_workers(reader: StoreReader) -> None:
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.states("set:V-3"), TRACKS[3].states)


def test_the_choice_of_extractor_is_explained(storage: Storage, root: str) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        StoreReader.open(storage, root)
    first = build(storage, root)
    with pytest.raises(StoreError, match=f"holds no extractor 'xyz'; it holds {SPEC.extractor_id}"):
        StoreReader.open(storage, root, "xyz")
    storage.write(f"{root}/{'f' * 16}/extractor.json", b"{}")
    with pytest.raises(StoreError, match="holds several extractors, name one of") as caught:
        StoreReader.open(storage, root)
    assert SPEC.extractor_id in str(caught.value)
    assert StoreReader.open(storage, root, SPEC.extractor_id).extractor_id == first.rsplit("/", 1)[-1]
    with pytest.raises(StoreError, match="extraction has not begun"):
        StoreReader.open(storage, root, "f" * 16)


def test_unknown_and_failed_tracks_have_no_states(reader: StoreReader) -> None:
    for ask in (reader.states, reader.track, reader.kinds):
        with pytest.raises(StoreError, match=r"track 'none' is not in index 3 .* 4 tracks"):
            ask("none")
    for ask in (reader.states, reader.kinds):
        with pytest.raises(StoreError, match=r"track 'set:V-1' has no states: it failed \(not_audio\)"):
            ask("set:V-1")


def test_damage_names_shard_and_track(storage: Storage, root: str) -> None:
    build(storage, root)
    reader = StoreReader.open(storage, root)
    row = reader.index.row("set:V-0")
    assert row is not None
    name = row["shard"]
    damage(storage, reader.root, name, lambda data: flip(data, row["payload_offset"] + 100))
    with pytest.raises(StoreError, match=rf"{name}.* track 'set:V-0'"):
        reader.states("set:V-0")
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        reader.track("set:V-0")
    damage(storage, reader.root, name, lambda data: data[: row["payload_offset"] + 100])
    with pytest.raises(StoreError, match=rf"{name} is damaged: it is truncated .* 'set:V-0'"):
        reader.states("set:V-0", 0, 50)
    with pytest.raises(StoreError, match=name):
        reader.track("set:V-0")
    storage.delete(shard_uri(reader.root, name))
    for ask in (
        lambda: reader.states("set:V-0"),
        lambda: reader.states("set:V-0", 3),
        lambda: reader.track("set:V-0"),
    ):
        with pytest.raises(StoreError, match=rf"{name}.*gone"):
            ask()


def test_a_shard_that_was_replaced_is_noticed(storage: Storage, root: str) -> None:
    build(storage, root)
    reader = StoreReader.open(storage, root)
    other: list[TrackStates] = [make_track(8, 200, 24), make_failed(1)]
    replacement = shard_of(write(storage, reader.root, other, extractor_id=SPEC.extractor_id))
    row = reader.index.row("set:V-0")
    assert row is not None
    damage(storage, reader.root, row["shard"], lambda _: storage.read(shard_uri(reader.root, replacement)))
    with pytest.raises(StoreError, match=r"does not hold track 'set:V-0'|is damaged"):
        reader.track("set:V-0")


def test_tracks_without_their_states_cost_none_of_their_bytes(storage: CountingStorage, root: str) -> None:
    root = build(storage, root)
    reader = StoreReader.open(storage, root.rsplit("/", 1)[0])
    for tracks in (TRACKS[:2], TRACKS[2:]):
        storage.reads.clear()
        found = reader.without_states([track.track_id for track in tracks])
        for ours, track in zip(found, tracks, strict=True):
            empty = np.zeros(0, np.int32)
            changes = {"states": np.zeros((0, 0), np.float16), "token_ids": empty}
            bare = {"kind": empty.astype(np.int8), "window": empty.astype(np.int16)}
            assert_same(ours, replace(track, **changes, **bare))
        reads = [
            (offset, offset + length) for kind, _, offset, length in storage.reads if kind == "read_range"
        ]
        for row in (reader.index.row(track.track_id) for track in tracks):
            first = row["payload_offset"]
            states = (first, first + 2 * row["num_states"] * row["dim"])
            # the footer's read, the first, begins anywhere
            assert not [r for r in reads[1:] if max(r[0], states[0]) < min(r[1], states[1])]


def test_a_damaged_page_is_found_without_the_states(storage: CountingStorage, root: str) -> None:
    root = build(storage, root)
    reader = StoreReader.open(storage, root.rsplit("/", 1)[0])
    shard = reader.index.row("set:V-3")["shard"]
    text = TRACKS[3].text.encode()
    damage(storage, root, shard, lambda data: flip(data, data.rindex(text) + 2))
    with pytest.raises(StoreError, match=r"is damaged: row 1 cannot be read"):
        reader.without_states(["set:V-2", "set:V-3"])
    assert reader.without_states(["set:V-0"])[0].text == TRACKS[0].text
    storage.delete(shard_uri(root, shard))
    with pytest.raises(StoreError, match=r"is gone"):
        reader.without_states(["set:V-2"])
