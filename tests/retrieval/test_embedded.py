from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.store.tracks import EXTRACTOR_ID
from wealy_ray.errors import StoreError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.embedded import StoreVectors, nearest_tracks
from wealy_ray.retrieval.imports import PackedVectors
from wealy_ray.retrieval.multi_vector import MultiVectorScores, PackedSets
from wealy_ray.storage import Storage
from wealy_ray.store import EMBEDDING_INDEX_SCHEMA, EmbedderSpec, IndexWriter, TrackVectors, write_vectors

DIM = 7


def embed(states_root: Path, digest: str, num_tracks: int = 23) -> EmbedderSpec:
    spec = EmbedderSpec(digest, EXTRACTOR_ID, None, {"mode": "windows"})
    storage, root = Storage(), spec.root(str(states_root))
    spec.ensure(storage, str(states_root), "model")
    writer = IndexWriter.claim(
        storage, root, manifest_digest="0" * 64, run_id="run", schema=EMBEDDING_INDEX_SCHEMA
    )
    rng = np.random.default_rng(0)
    tracks = [
        TrackVectors(f"t{n:02d}", "s", 9, rng.normal(size=(1 + n % 4, DIM)).astype(np.float32))
        for n in range(num_tracks)
    ]
    for part in (tracks[:5], tracks[5:6], tracks[6:]):
        writer.publish(write_vectors(storage, root, part, DIM, {}))
    return spec


def test_the_nearest_are_those_of_the_evaluation(tmp_path: Path) -> None:
    embed(tmp_path, "one")
    source = StoreVectors.open(Storage(), str(tmp_path), None)
    packed = PackedVectors.of(source)
    assert source.num_bytes == packed.vectors.nbytes
    collection = Collection.of(packed.track_ids.tolist(), [None] * len(packed.track_ids))
    sets = PackedSets.of_collection(collection, packed.track_ids, packed.vectors, packed.offsets)
    scores = MultiVectorScores(sets, collection.candidates)
    for place, asked in enumerate(packed.track_ids.tolist()):
        row = scores.rows(np.array([place]))[0].numpy() + 1  # cosines
        row[place] = -np.inf
        expected = [packed.track_ids[i] for i in np.argsort(-row, kind="stable")[:6]]
        found = nearest_tracks(source.reader, sets.of(place), asked, 6)
        assert [track_id for track_id, _ in found] == expected
        np.testing.assert_allclose([c for _, c in found], np.sort(row)[::-1][:6], atol=1e-6)
    assert len(nearest_tracks(source.reader, sets.of(0), "a stranger", 100)) == 23


def test_the_choice_must_be_clear(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no embeddings: `wealy embed` makes them"):
        StoreVectors.open(Storage(), str(tmp_path), None)
    one, two = embed(tmp_path, "one"), embed(tmp_path, "two")
    with pytest.raises(StoreError, match="set embedder_id to one of"):
        StoreVectors.open(Storage(), str(tmp_path), None)
    with pytest.raises(StoreError, match=f"has no embeddings 'x'; it has .*{two.embedder_id}"):
        StoreVectors.open(Storage(), str(tmp_path), "x")
    source = StoreVectors.open(Storage(), str(tmp_path), one.embedder_id)
    assert list(source.version) == [one.embedder_id, 4]
