"""Which tracks were in an engine when it died: flight records and the list of suspects.

Every engine actor keeps one small object, `flight/<actor>.json`, with the ids of the tracks it works on. When
Ray Data has given up on an actor, its record names the suspects: they run alone, one at a time. How often a
suspect killed its engine alone is kept in `suspects.json`, so that a restarted driver goes on counting.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable

from wealy_ray.storage import ObjectMissingError, Storage, join


class FlightRecorder:
    """The record of one engine actor; thread-safe.

    Args:
        storage: Where the store lies.
        root: `<store>/<extractor-id>`.
        actor_id: Names the record; a restarted actor keeps its id and overwrites it.
    """

    def __init__(self, storage: Storage, root: str, actor_id: str) -> None:
        self.storage, self.uri = storage, join(root, "flight", f"{actor_id}.json")
        self._flying: list[str] = []
        self._lock = threading.Lock()

    def begin(self, track_ids: Iterable[str]) -> None:
        """Must return before work on the tracks begins."""
        with self._lock:
            self._flying += track_ids
            self._write()

    def end(self, track_ids: Iterable[str]) -> None:
        """The tracks left the engine, well or badly, without killing it."""
        with self._lock:
            for track_id in track_ids:
                self._flying.remove(track_id)
            self._write()

    def _write(self) -> None:
        self.storage.write(self.uri, json.dumps(self._flying).encode())


def flying(storage: Storage, root: str, actor_id: str | None) -> set[str]:
    """Ids in the record of one actor; of all actors when `actor_id` is None or left no record."""
    records = {info.uri.rsplit("/", 1)[-1]: info.uri for info in storage.list(join(root, "flight"))}
    named = records.get(f"{actor_id}.json")
    uris = [named] if named else [uri for name, uri in records.items() if name.endswith(".json")]
    return {track_id for uri in uris for track_id in json.loads(storage.read(uri))}


def clear_records(storage: Storage, root: str) -> None:
    """Forgets all records: at the start of a pass no engine of ours is at work."""
    for info in storage.list(join(root, "flight")):
        storage.delete(info.uri)


class Suspects:
    """Tracks that may have killed an engine, with how often each did so alone.

    Only the driver that holds the claim writes it.
    """

    def __init__(self, storage: Storage, root: str) -> None:
        self.storage, self.uri = storage, join(root, "suspects.json")
        try:
            self.kills: dict[str, int] = json.loads(storage.read(self.uri))
        except (ObjectMissingError, ValueError):  # none, or damaged: then counting starts anew
            self.kills = {}

    def add(self, track_ids: Iterable[str]) -> None:
        """Puts tracks under suspicion; those already there keep their count."""
        self._change({**dict.fromkeys(track_ids, 0), **self.kills})

    def killed_alone(self, track_id: str) -> int:
        """Counts one more engine killed by this track alone; returns the count."""
        self._change({**self.kills, track_id: self.kills.get(track_id, 0) + 1})
        return self.kills[track_id]

    def clear(self, track_ids: Iterable[str]) -> None:
        """The tracks have their row: nothing is held against them any more."""
        gone = set(track_ids)
        if gone & self.kills.keys():
            self._change({k: v for k, v in self.kills.items() if k not in gone})

    def _change(self, kills: dict[str, int]) -> None:
        self.kills = kills
        self.storage.write(self.uri, json.dumps(kills).encode())
