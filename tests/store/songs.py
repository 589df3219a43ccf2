"""A small store that can be learned from."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tests.store.tracks import EXTRACTOR_ID, make_failed, make_track, write
from wealy_ray.catalog import write_manifest
from wealy_ray.storage import Storage, join
from wealy_ray.store import IndexWriter

DIM, CLIQUES, VERSIONS = 12, 20, 3


def make_song_store(folder: str, storage: Storage) -> None:
    """`manifest.parquet` and `store/`, whose versions share a pattern hidden under noise and two loud channels."""
    root = join(folder, "store", EXTRACTOR_ID)
    storage.write(join(root, "extractor.json"), b"{}")
    rows, tracks = [], []
    for number in range(CLIQUES * VERSIONS):
        clique = number // VERSIONS
        rng = np.random.default_rng([1, number])
        pattern = np.random.default_rng([2, clique]).normal(size=(6, DIM))
        length = int(rng.integers(20, 90))
        states = pattern[rng.integers(0, 6, length)] + 0.8 * rng.normal(size=(length, DIM))
        states[:, :2] += 20 * rng.normal(size=2)
        kind = np.full(length, 2, np.int8)
        kind[:3] = 1
        tracks.append(
            make_track(number, num_states=length, dim=DIM, states=states.astype(np.float16), kind=kind)
        )
        split = "val" if clique >= CLIQUES - 6 else "train"
        rows.append((f"set:V-{number}", f"c{clique:02d}", split, "en" if number % 2 else "es"))
    tracks.append(make_failed(900))
    rows += [("set:V-900", "c00", "train", None), ("set:V-901", None, "train", None)]
    writer = IndexWriter.claim(storage, root, manifest_digest="0" * 64, run_id="run")
    writer.publish(write(storage, root, tracks))
    ids, cliques, splits, languages = zip(*rows, strict=True)
    table = pa.table(
        {
            "track_id": ids,
            "clique_id": cliques,
            "split": splits,
            "language": languages,
            "audio_uri": [f"s3://a/{i}" for i in ids],
        }
    )
    write_manifest(storage, join(folder, "manifest.parquet"), table)
