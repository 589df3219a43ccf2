"""Makes songs by many processes, each song once: what is there whole is not made again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from examples.song_generator.installed import check_installed
from examples.song_generator.rendering import encode, render
from examples.song_generator.song import Song
from examples.song_generator.voices import SAMPLE_RATE_HZ
from wealy_ray.errors import ConfigError, TransientError
from wealy_ray.progress import Progress
from wealy_ray.storage import Storage

MANIFEST, UNFINISHED = "manifest.jsonl", "manifest.unfinished.jsonl"

Row = dict[str, Any]
"""A line of the manifest."""


def make_songs(songs: Sequence[Song], folder: Path, processes: int) -> Path:
    """Makes the songs that `folder` does not hold yet, then writes the manifest of all.

    Args:
        songs: What to make; a song's bytes do not depend on the others.
        folder: For `audio/` and `manifest.jsonl`; rows of finished songs wait in `manifest.unfinished.jsonl`.
        processes: Songs that are made at a time.

    Returns:
        The manifest.

    Raises:
        ConfigError: Something is not installed, a voice has another digest, or the folder holds other songs.
        StorageError: The folder cannot be written.
        TransientError: A process was killed.
    """
    storage = Storage()
    storage.check_folder(str(folder))
    rows = _finished(songs, folder)
    missing = [song for song in songs if song.track.track_id not in rows]
    if missing:
        check_installed({song.track.engine for song in missing if song.track.engine})
        _make(missing, folder, processes, rows)
    ordered = [rows[track_id] for track_id in sorted(rows)]
    storage.write(str(folder / MANIFEST), "".join(map(_line, ordered)).encode())
    storage.delete(str(folder / UNFINISHED))
    return folder / MANIFEST


def _make(songs: list[Song], folder: Path, processes: int, rows: dict[str, Row]) -> None:
    """Makes songs and adds their rows, to `rows` and to the folder."""
    progress = Progress(len(songs) + len(rows), already_done=len(rows))
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(songs)), context, _begin_process)
    with open(folder / UNFINISHED, "a", encoding="utf-8") as unfinished:
        unfinished.write("\n")  # ends a line that a killed run left half written
        futures = [pool.submit(_make_song, song, folder) for song in songs]
        try:
            for future in as_completed(futures):
                row = future.result()
                rows[row["track_id"]] = row
                unfinished.write(_line(row))
                unfinished.flush()
                progress.add(1, 0, row["duration_s"])
        except BrokenProcessPool as e:
            raise TransientError(
                "a process that made songs was killed, perhaps for memory; run the same command again, "
                "with fewer --processes if need be"
            ) from e
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a song may take long: the caller need not wait
    progress.close()


def _begin_process() -> None:
    """Ctrl-C is for the parent alone, and without a parent there is nobody to make songs for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _make_song(song: Song, folder: Path) -> Row:
    """Makes one song's file and returns its row."""
    try:
        samples = render(song)
        data = encode(samples, song)
    except ConfigError as e:
        raise ConfigError(f"song {song.track.track_id} cannot be made: {e}") from e
    Storage().write(str(folder / song.path), data)
    planned = song.planned_row()
    lyrics = planned.pop("lyrics")
    return planned | {
        "duration_s": round(len(samples) / SAMPLE_RATE_HZ, 2),
        "lyrics": lyrics,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _finished(songs: Sequence[Song], folder: Path) -> dict[str, Row]:
    """Rows of the songs that are there whole and as planned, by track id."""
    planned = {song.track.track_id: song.planned_row() for song in songs}
    rows = {}
    for row in [*_read_rows(folder / MANIFEST), *_read_rows(folder / UNFINISHED)]:
        plan = planned.get(row["track_id"])
        if plan is None:
            raise ConfigError(f"{folder} holds other songs ({row['track_id']}); name another folder")
        path = folder / plan["path"]
        if not all(row.get(key) == value for key, value in plan.items()) or not path.is_file():
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() == row.get("sha256"):
            rows[row["track_id"]] = row
    return rows


def _read_rows(path: Path) -> list[Row]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # a run was killed while it wrote this line
            continue
        if isinstance(row, dict) and "track_id" in row:
            rows.append(row)
    return rows


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
