"""`wealy search`: the tracks of a store that are nearest to a track, an audio file or a text."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.errors import ConfigError, StoreError
from wealy_ray.pipelines.one_track import embed_one, extract_one, recipe_of_store
from wealy_ray.progress import Progress
from wealy_ray.retrieval.approximate import RECALL_AT, ApproximateIndex
from wealy_ray.retrieval.embedded import StoreVectors, nearest_tracks
from wealy_ray.retrieval.material import (
    MATERIAL_SCHEMA,
    Material,
    material_row,
    shard_material,
    tracks_by_shard,
)
from wealy_ray.retrieval.search import BY, Found, describe, find_nearest
from wealy_ray.storage import Storage
from wealy_ray.store import (
    EmbeddingReader,
    StoreReader,
    TrackStates,
    count_stale,
    list_embedders,
    released_embeddings,
)

log = logging.getLogger(__name__)

NUM_READERS = 8
"""Shards that are read at a time."""
LINE_LENGTH = 100
"""Characters of a text that are shown."""
DEFAULT_BY = "tfidf_characters"
"""What is compared where there are no embeddings."""
NO_ID = "\N{NULL}query"
"""Stands for a query that is no track of the store."""


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        query: The query in words.
        by: What was compared.
        num_tracks: Tracks that could have been found.
        found: The nearest, best first.
        recall: Share of the exact neighbours that an approximate index finds; None: the search was exact.
        transcript: What Whisper heard in the query, or the text itself.
    """

    query: str
    by: str
    num_tracks: int
    found: list[Found]
    recall: float | None
    transcript: str


def run_search(
    storage: Storage,
    store: str,
    query: str,
    *,
    by: str | None = None,
    top: int = 10,
    is_text: bool = False,
    model: str | None = None,
    extractor_id: str | None = None,
    embedder_id: str | None = None,
    approximate: str | None = None,
) -> Searched:
    """Searches a store; nothing of it changes (what is computed of its states is kept beside them).

    Args:
        storage: Access.
        store: The store.
        query: A track id of the store, else the path or URI of an audio file.
        by: What is compared; None: the released embeddings where there are any and the query is no text, else
            `DEFAULT_BY`.
        top: How many tracks are wanted.
        is_text: The query is lyrics.
        model: Whisper weights for an audio query; None: those that the store's recipe names.
        extractor_id: Which extractor; None: the only one.
        embedder_id: Which embeddings; None: those of the store's newest release.
        approximate: Local folder of an approximate index, built when it is not there; None: exact.

    Raises:
        WealyError: See `wealy_ray.errors`.
    """
    if by is not None and by not in BY:
        raise ConfigError(f"nothing can be compared by '{by}'; there are {', '.join(BY)}")
    if by == "embedding" and is_text:
        raise ConfigError("a text has no states: --by embedding compares a track or an audio file")
    if embedder_id and (is_text or by not in (None, "embedding")):
        raise ConfigError("--embedder-id names embeddings: leave out --text, and --by anything else")
    if approximate and by != "avg_embedding":
        raise ConfigError("an approximate index holds mean states: add --by avg_embedding")
    reader = StoreReader.open(storage, store, extractor_id)
    if is_text:
        asked = dict.fromkeys(MATERIAL_SCHEMA.names) | {"track_id": NO_ID, "text": query}
        found = find_nearest(_all_material(reader), asked, by or DEFAULT_BY, top)
        return Searched("a text", by or DEFAULT_BY, reader.index.counts()["ok"], found, None, query)
    embeddings = None
    if embedder_id is not None:
        embeddings = StoreVectors.open(storage, reader.root, embedder_id).reader
    elif by in (None, "embedding"):
        embeddings = released_embeddings(storage, store, reader.extractor_id)
        if embeddings is None and list_embedders(storage, reader.root):
            log.warning(
                "the store's embeddings are not released; `wealy embed` does so when they are complete"
            )
    if by == "embedding" and embeddings is None:
        raise ConfigError(f"the store {reader.root} has no released embeddings: `wealy embed` makes them")
    track, words = _query(reader, query, model)
    if embeddings is not None:
        return _by_embedding(reader, embeddings, track, words, top)
    by, asked = by or DEFAULT_BY, material_row(track)
    num_tracks = reader.index.counts()["ok"] - (reader.index.row(asked["track_id"]) is not None)
    if approximate:
        index = _approximate_index(reader, Path(approximate))
        found = _by_graph(reader, index, asked, top)
        return Searched(words, by, num_tracks, found, index.recall, asked["text"] or "")
    found = find_nearest(_all_material(reader), asked, by, top)
    return Searched(words, by, num_tracks, found, None, asked["text"] or "")


def search_table(searched: Searched) -> str:
    """What a search found, for a terminal."""
    how = (
        "exact"
        if searched.recall is None
        else (
            f"approximate: {searched.recall:.1%} of the exact {RECALL_AT} nearest are found, measured on this store"
        )
    )
    lines = [f"nearest to {searched.query} by {searched.by}, among {searched.num_tracks} tracks ({how})"]
    heard = " ".join(searched.transcript.split())
    lines.append(
        f"  query: {heard[:100]}{' ...' if len(heard) > 100 else ''}" if heard else "  query: no words"
    )
    width = max((len(f.track_id) for f in searched.found), default=0)
    for f in searched.found:
        lines.append(f"{f.rank:>3}  {f.score:6.3f}  {f.track_id:<{width}}  {f.language}".rstrip())
        lines += [f'       "{_cut(passage)}"' for passage in f.lyrics]
    if not searched.found:
        lines.append("  nothing that could be compared")
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= LINE_LENGTH else text[:LINE_LENGTH] + " ..."


def _query(reader: StoreReader, query: str, model: str | None) -> tuple[TrackStates, str]:
    """The query's states, and the query in words."""
    if reader.index.row(query) is not None:
        return reader.track(query), f"track {query}"
    if not reader.storage.exists(query):
        raise ConfigError(
            f"'{query}' is neither a track of index {reader.index.number} of {reader.root} nor an audio file; put "
            "--text before lyrics"
        )
    track = extract_one(reader, recipe_of_store(reader, model), query)
    return dataclasses.replace(track, track_id=NO_ID), query


def _by_embedding(
    reader: StoreReader, embeddings: EmbeddingReader, track: TrackStates, words: str, top: int
) -> Searched:
    states, stored = reader.index.row(track.track_id), embeddings.index.row(track.track_id)
    is_current = states and stored and states["checksum"] == stored["source_checksum"]
    vectors = embeddings.vectors(track.track_id) if is_current else None
    if vectors is None:
        vectors = embed_one(embeddings, track)
    stale = count_stale(reader.index.table, embeddings.index)
    if stale:
        log.warning(
            "%d tracks have no vectors of their states as they are now; `wealy embed` makes them", stale
        )
    near = nearest_tracks(embeddings, vectors, track.track_id, top)
    others = embeddings.ok.num_rows - (stored is not None and stored["status"] == "ok")
    found = _described(reader, material_row(track), near)
    return Searched(words, f"embedding {embeddings.embedder_id}", others, found, None, track.text)


def _all_material(reader: StoreReader) -> pa.Table:
    """Material of all tracks, from what is kept, or else from the states."""
    shards = tracks_by_shard(reader.index.table)
    if not shards:
        raise StoreError(f"the store {reader.root} has no track with states")
    tables = []
    progress = Progress(sum(len(tracks) for _, tracks in shards))
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for table in pool.map(lambda piece: shard_material(reader, *piece), shards):
            tables.append(table)
            progress.add(table.num_rows, 0, pc.sum(table["duration_s"]).as_py() or 0.0)
            progress.tick()
    progress.close()
    return pa.concat_tables(tables)


def _approximate_index(reader: StoreReader, folder: Path) -> ApproximateIndex:
    folder = folder / f"{reader.extractor_id}-{reader.index.number}"
    if not (folder / "facts.json").exists():
        log.info("building an approximate index in %s", folder)
        material = _all_material(reader)
        known = material.filter(pc.is_valid(material["mean_all"]))
        ids = known["track_id"].to_pylist()
        vectors, _ = Material(known, splits={}).means(ids, "all")
        ApproximateIndex.build(folder, ids, vectors)
    return ApproximateIndex.open(folder)


def _by_graph(reader: StoreReader, index: ApproximateIndex, asked: dict[str, Any], top: int) -> list[Found]:
    if asked["mean_all"] is None:
        raise ConfigError("the query has no states: --by avg_embedding compares a track or an audio file")
    near = index.nearest(np.array(asked["mean_all"], np.float32), top + 1)
    return _described(reader, asked, [pair for pair in near if pair[0] != asked["track_id"]][:top])


def _described(reader: StoreReader, asked: dict[str, Any], near: Sequence[tuple[str, float]]) -> list[Found]:
    rows = [material_row(reader.track(track_id)) for track_id, _ in near]
    return describe(Material(pa.Table.from_pylist(rows, schema=MATERIAL_SCHEMA), splits={}), asked, near)
