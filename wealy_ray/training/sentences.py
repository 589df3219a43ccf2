"""Sentences in the place of states: what Whisper wrote, as vectors of a sentence encoder, in a store of their own.

One of the paper's baselines gives the Transformer vectors of a sentence encoder instead of decoder states. A track's
vectors lie in shards as its states do, so whatever reads states (crops, windows, `wealy embed`) reads them.

<folder>/<id>/extractor.json     that of the states, and the encoder; the id is its digest
<folder>/<id>/shards/, index/    see `wealy_ray.store`; a track without words has no vectors
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.errors import ConfigError
from wealy_ray.model import digest_of
from wealy_ray.progress import Progress
from wealy_ray.report.run_record import new_run_id
from wealy_ray.retrieval.material import tracks_by_shard
from wealy_ray.retrieval.sentence import encode, load_encoder
from wealy_ray.retrieval.text import without_words
from wealy_ray.storage import Storage, join
from wealy_ray.store import (
    Index,
    IndexWriter,
    Lease,
    StoreReader,
    TrackStates,
    lie_in,
    list_extractors,
    lost_shards,
    read_latest,
    split_work,
    write_shard,
)
from wealy_ray.whisper.types import Kind

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SENTENCES_VERSION = 1
"""Part of the id; moved when a transcript would be cut otherwise."""
ENDS = re.compile("(?<=[.!?\u2026\u061f\u0964])\\s+|(?<=[\u3002\uff01\uff1f])|\n")
"""Where a sentence ends: after . ! ? and their like in other scripts."""
NO_TOKEN = -1
"""A sentence's vector predicts none."""
PUBLISH_S = 60.0
"""So much work is lost at most when encoding is interrupted."""
LEASE_S = 120.0


def split_sentences(text: str) -> list[str]:
    """Sentences of a window's text that hold a word; what Whisper wrote without a full stop is one.

    An encoder reads a sentence's beginning only, see `sentence_vectors`: a whole window may be longer.
    """
    pieces = [piece.strip() for piece in ENDS.split(text)]
    return [piece for piece, empty in zip(pieces, without_words(pieces), strict=True) if not empty]


def sentence_reader(
    source: StoreReader, folder: str, model: str, track_ids: Sequence[str], every_s: float = 30.0
) -> StoreReader:
    """A store of tracks' sentences; what is missing there is encoded first, by this process.

    Args:
        source: States with transcripts.
        folder: Where the sentences' store is, or comes to be.
        model: Name or folder of a sentence-transformers model.
        track_ids: Tracks that are needed; those that `source` has no states of are passed over.
        every_s: Distance of two progress lines in a job log.

    Raises:
        ConfigError: The extra `text` is not installed, or the model cannot be loaded or used.
        StoreError: A shard is damaged or gone.
    """
    needed = _needed(source, track_ids)
    reader = _complete(source, folder, model, needed)
    if reader is not None:
        return reader
    encoder = load_encoder(model)
    with Lease(source.storage, folder, new_run_id(), LEASE_S):
        # whom we may have waited for has done it
        return _complete(source, folder, model, needed) or _make(
            source, folder, model, encoder, needed, every_s=every_s
        )


def _needed(source: StoreReader, track_ids: Sequence[str]) -> pa.Table:
    """Index rows of the tracks, with the version of their audio as `split_work` looks for it."""
    rows = source.index.table
    asked = pc.is_in(rows["track_id"], value_set=pa.array(track_ids, pa.string()))
    rows = rows.filter(pc.and_(asked, pc.equal(rows["status"], "ok")))
    return rows.append_column("etag", rows["audio_etag"])


def _complete(source: StoreReader, folder: str, model: str, needed: pa.Table) -> StoreReader | None:
    """What was made of the same states by a model of the same name, if no track is missing: no model is loaded."""
    storage = source.storage
    for extractor_id, settings in list_extractors(storage, folder).items():
        encoder = settings.get("sentences") or {}
        if settings != _settings(source, model, encoder.get("weights_digest", "")):
            continue
        root = join(folder, extractor_id)
        index = read_latest(storage, root)
        if index is not None and _done(storage, root, needed, index).all():
            return StoreReader(storage, root, index)
    return None


def _done(storage: Storage, root: str, needed: pa.Table, index: Index) -> np.ndarray:
    lost = lost_shards(storage, root, index)
    return split_work(needed, index) & ~lie_in(lost, needed["track_id"], index)


def _settings(source: StoreReader, model: str, weights_digest: str) -> dict[str, Any]:
    """What the vectors depend on: the content of `extractor.json`."""
    states = list_extractors(source.storage, source.root.rstrip("/").rsplit("/", 1)[0])[source.extractor_id]
    encoder = {"model": model, "weights_digest": weights_digest, "version": SENTENCES_VERSION}
    return states | {"states_of": source.extractor_id, "sentences": encoder}


def _make(
    source: StoreReader,
    folder: str,
    model: str,
    encoder: SentenceTransformer,
    needed: pa.Table,
    *,
    every_s: float,
) -> StoreReader:
    """Encodes shard by shard, and publishes now and then."""
    storage = source.storage
    settings = _settings(source, model, digest_of(encoder.state_dict()))
    extractor_id = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    root = join(folder, extractor_id)
    storage.write_if_absent(join(root, "extractor.json"), (json.dumps(settings, indent=2) + "\n").encode())
    manifest = source.index.metadata["manifest_digest"]
    writer = IndexWriter.claim(storage, root, manifest_digest=manifest, run_id=new_run_id())
    left = needed.filter(pa.array(~_done(storage, root, needed, writer.index)))
    progress = Progress(len(needed), len(needed) - len(left), interval_s=every_s)
    receipts, published_s = [], time.monotonic()
    numerics = {"device": encoder.device.type}
    dim = encode(encoder, ["a"]).shape[1]
    for _, track_ids in tracks_by_shard(left):
        tracks = list(_encoded(source.without_states(track_ids), encoder, dim))
        receipts.append(
            write_shard(
                storage, root, tracks, extractor_id=extractor_id, epoch=writer.epoch, numerics=numerics
            )
        )
        progress.add(len(tracks), 0, sum(track.duration_s or 0.0 for track in tracks))
        if time.monotonic() - published_s > PUBLISH_S:
            writer.publish(pa.concat_tables(receipts))
            receipts, published_s = [], time.monotonic()
    if receipts:
        writer.publish(pa.concat_tables(receipts))
    progress.close()
    return StoreReader(storage, root, writer.index)


def _encoded(tracks: Sequence[TrackStates], encoder: SentenceTransformer, dim: int) -> Iterator[TrackStates]:
    """The tracks with vectors float16 [num_sentences, dim] for their states.

    Raises:
        ConfigError: A vector is NaN, or too large for half precision.
    """
    found = [[split_sentences(window.text) for window in track.windows] for track in tracks]
    texts = [text for windows in found for sentences in windows for text in sentences]
    vectors = encode(encoder, texts) if texts else np.zeros((0, dim), np.float32)
    with np.errstate(over="ignore"):
        vectors = vectors.astype(np.float16)
    first = 0
    for track, windows in zip(tracks, found, strict=True):
        counts = [len(sentences) for sentences in windows]
        mine = vectors[first : first + sum(counts)]
        first += len(mine)
        if not np.isfinite(mine).all():
            raise ConfigError(
                f"the sentence model gives numbers for track '{track.track_id}' that half precision cannot hold: use "
                "one whose vectors are normalised"
            )
        yield replace(
            track,
            states=mine,
            token_ids=np.full(len(mine), NO_TOKEN, np.int32),
            kind=np.full(len(mine), Kind.TEXT, np.int8),
            window=np.repeat(np.arange(len(counts)), counts).astype(np.int16),
        )
