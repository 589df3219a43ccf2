"""Releases: which index, which embeddings and which model belong together for those who read.

<store>/releases/<n>.json, n = 1, 2, ...; written if absent, never changed; the highest one counts. An embedding is
released when each track of its states has its row, so that nobody searches half of one.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields

from wealy_ray.errors import StoreError
from wealy_ray.storage import Storage, join
from wealy_ray.store.embedder import embeddings_folder
from wealy_ray.store.embedding_reader import EmbeddingReader
from wealy_ray.store.extractor import read_settings


@dataclass(frozen=True)
class Release:
    """What belongs together.

    Attributes:
        manifest_digest: Of the manifest that the states are of.
        extractor_id: What the states were computed with.
        index: Number of their index.
        model_digest: Of the model's weights and settings.
        embedder_id: What the vectors were computed with.
        embeddings_index: Number of their index.
    """

    manifest_digest: str
    extractor_id: str
    index: int
    model_digest: str
    embedder_id: str
    embeddings_index: int


def publish_release(storage: Storage, store: str, release: Release, run_id: str) -> int:
    """Makes a release the one that counts for its extractor; does nothing when it does already.

    Args:
        storage: Where the store is.
        store: Its folder.
        release: What belongs together.
        run_id: Who says so.

    Returns:
        Its number.

    Raises:
        StoreError: The release that counts is damaged.
    """
    while True:
        found = newest_release(storage, store, release.extractor_id)
        if found is not None and found[1] == release:
            return found[0]
        number = max(_numbers(storage, store), default=0) + 1
        data = json.dumps(asdict(release) | {"run_id": run_id}, indent=2) + "\n"
        if storage.write_if_absent(_uri(store, number), data.encode()):
            return number


def newest_release(storage: Storage, store: str, extractor_id: str) -> tuple[int, Release] | None:
    """The release of an extractor's states that counts, with its number; None: there is none.

    Raises:
        StoreError: A release is damaged.
    """
    for number in reversed(_numbers(storage, store)):
        release = _read(storage, store, number)
        if release.extractor_id == extractor_id:
            return number, release
    return None


def released_embeddings(storage: Storage, store: str, extractor_id: str) -> EmbeddingReader | None:
    """The vectors of the release that counts, as they were released; None: there is none.

    Raises:
        StoreError: The release is damaged, or what it names is gone or damaged.
    """
    found = newest_release(storage, store, extractor_id)
    if found is None:
        return None
    number, release = found
    root = join(embeddings_folder(join(store, extractor_id)), release.embedder_id)
    try:
        return EmbeddingReader.open(storage, root, release.embeddings_index)
    except StoreError as e:
        raise StoreError(
            f"{e}; release {number} of {store} names it: `wealy embed` makes another release, or remove "
            f"{_uri(store, number)}, and the one before it counts"
        ) from e


def _numbers(storage: Storage, store: str) -> list[int]:
    names = (info.uri.rsplit("/", 1)[-1] for info in storage.list(join(store, "releases")))
    return sorted(int(m.group(1)) for name in names if (m := re.fullmatch(r"([1-9]\d*)\.json", name)))


def _read(storage: Storage, store: str, number: int) -> Release:
    uri = _uri(store, number)
    found = read_settings(storage, uri) or {}
    try:
        return Release(**{field.name: found[field.name] for field in fields(Release)})
    except KeyError as e:
        raise StoreError(
            f"the release {uri} is damaged: remove it, and the one before it counts until `wealy embed` makes another"
        ) from e


def _uri(store: str, number: int) -> str:
    return join(store, "releases", f"{number}.json")
