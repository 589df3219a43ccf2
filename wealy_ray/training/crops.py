"""Crops of tracks: read by the index, only the bytes between their first and last state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from wealy_ray.store import StoreReader
from wealy_ray.whisper.types import Kind


@dataclass(frozen=True, eq=False)
class CropReader:
    """Reads what training sees of a track.

    Attributes:
        reader: The store.
        length: States of a crop; shorter tracks are taken whole.
        kinds: Kinds of states that count (`Kind`), in the order of the track; None: all.
    """

    reader: StoreReader
    length: int
    kinds: frozenset[int] | None = None

    def num_states(self, track_ids: Sequence[str]) -> np.ndarray:
        """States of each track that count, int64; 0 for a track that failed or is not there."""
        table = self.reader.index.table
        places = self.reader.index.positions(pa.array(track_ids, pa.string()))
        found = np.zeros(len(track_ids), np.int64)
        known = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
        rows = table.take(places.take(pa.array(known)))
        if self.kinds is None:
            found[known] = rows["num_states"].fill_null(0).to_numpy()
            return found
        for place, runs in zip(known.tolist(), rows["kind_runs"].to_pylist(), strict=True):
            pairs = np.asarray(runs or [], np.int64).reshape(-1, 2)
            found[place] = pairs[np.isin(pairs[:, 0], list(self.kinds)), 1].sum()
        return found

    def random(self, track_id: str, num_states: int, rng: np.random.Generator) -> np.ndarray:
        """A crop that begins anywhere, each beginning as likely, float16 [n, dim].

        Args:
            track_id: The track.
            num_states: Its states that count, see `num_states`.
            rng: Draws the beginning.
        """
        return self.at(track_id, int(rng.integers(0, max(1, num_states - self.length + 1))))

    def at(self, track_id: str, start: int) -> np.ndarray:
        """The crop that begins with the given state of those that count, float16 [n, dim]."""
        stop = start + self.length
        if self.kinds is None:
            return self.reader.states(track_id, start, stop)
        chosen = np.flatnonzero(np.isin(self.reader.kinds(track_id), list(self.kinds)))[start:stop]
        first, last = (int(chosen[0]), int(chosen[-1])) if len(chosen) else (0, -1)
        return self.reader.states(track_id, first, last + 1)[chosen - first]


def kinds_by_name(names: Sequence[str] | None) -> frozenset[int] | None:
    """Numbers of kinds: `prompt`, `sot`, `text`, `timestamp`, `eot`."""
    return None if names is None else frozenset(int(Kind[name.upper()]) for name in names)
