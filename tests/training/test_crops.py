from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.store.songs import CLIQUES, VERSIONS
from wealy_ray.storage import Storage
from wealy_ray.store import StoreReader
from wealy_ray.training.crops import CropReader, kinds_by_name

IDS = [f"set:V-{number}" for number in range(CLIQUES * VERSIONS)]


@pytest.fixture
def reader(song_store: Path) -> StoreReader:
    return StoreReader.open(Storage(), str(song_store / "store"))


@pytest.mark.parametrize("names", [None, ["text"], ["sot", "eot"], ["sot", "text"], ["eot"]])
@pytest.mark.parametrize("length", [7, 40, 1000])
def test_a_crop_is_a_slice_of_the_states_that_count(
    reader: StoreReader, names: list[str] | None, length: int
) -> None:
    kinds = kinds_by_name(names)
    crops = CropReader(reader, length, kinds)
    rows = crops.rows(IDS)
    counts = crops.num_states(rows)
    for track_id, row, count in zip(IDS, rows.tolist(), counts.tolist(), strict=True):
        states = reader.states(track_id)
        if kinds is not None:
            states = states[np.isin(reader.kinds(track_id), list(kinds))]
        assert count == len(states)
        for start in {0, len(states) // 3, max(0, len(states) - length)}:
            np.testing.assert_array_equal(crops.at(row, start), states[start : start + length])


def test_failed_and_unknown_tracks_have_no_states(reader: StoreReader) -> None:
    for kinds in (None, frozenset({2})):
        crops = CropReader(reader, 40, kinds)
        rows = crops.rows(["set:V-0", "nobody", "set:V-900"])
        assert crops.num_states(rows)[1:].tolist() == [0, 0]
        assert crops.num_states(rows)[0] > 0
        assert rows[1] == -1


def test_what_travels_to_loaders_reads_the_same_and_is_small(reader: StoreReader) -> None:
    crops = CropReader(reader, 40)
    data = pickle.dumps(crops)
    row = int(crops.rows(["set:V-7"])[0])
    np.testing.assert_array_equal(pickle.loads(data).at(row, 3), crops.at(row, 3))
    assert len(data) < 80 * len(IDS) + 2000, "about 60 bytes a track"
