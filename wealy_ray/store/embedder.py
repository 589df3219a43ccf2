"""The embedder's identity: a digest of everything that changes the vectors. Vectors of different ids never mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wealy_ray.errors import StoreError
from wealy_ray.storage import Storage, join
from wealy_ray.store.extractor import canonical_json, read_settings

EMBEDDING_VERSION = 1
"""Bumped by hand when vectors of the same model and states would differ by more than rounding, and only then."""


@dataclass(frozen=True)
class EmbedderSpec:
    """What changes the vectors; every value can be written as JSON.

    Attributes:
        model_digest: Digest of the network's weights and settings.
        extractor_id: What the states were computed with.
        kinds: Names of the kinds of states that count; None: all.
        windows: What of a track a vector is computed of: mode, and all that matters in it.
        embedding_version: See `EMBEDDING_VERSION`.
    """

    model_digest: str
    extractor_id: str
    kinds: Sequence[str] | None
    windows: Mapping[str, Any]
    embedding_version: int = EMBEDDING_VERSION

    @property
    def embedder_id(self) -> str:
        """First 16 hexadecimal digits of SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()[:16]

    def root(self, states_root: str) -> str:
        """`<store>/<extractor-id>/embeddings/<embedder-id>`."""
        return join(embeddings_folder(states_root), self.embedder_id)

    def ensure(self, storage: Storage, states_root: str, model: str) -> None:
        """Writes `embedder.json` if it is absent, and compares it when it is there.

        Args:
            storage: Where the store is.
            states_root: `<store>/<extractor-id>`.
            model: Where the model came from: no part of the identity.

        Raises:
            StoreError: A file is there and says something else.
        """
        uri = join(self.root(states_root), "embedder.json")
        settings = {**asdict(self), "model": model}
        if storage.write_if_absent(uri, (json.dumps(settings, indent=2) + "\n").encode()):
            return
        found = read_settings(storage, uri) or {}
        if canonical_json({**found, "model": model}) != canonical_json(settings):
            raise StoreError(
                f"{uri} does not describe embedder {self.embedder_id}: it was changed or damaged; restore it"
            )


def kept_model(root: str) -> str:
    """Where embeddings keep the model that they are of: whoever has the store can embed a query."""
    return join(root, "model")


def embeddings_folder(states_root: str) -> str:
    """`<store>/<extractor-id>/embeddings`."""
    return join(states_root, "embeddings")


def list_embedders(storage: Storage, states_root: str) -> dict[str, dict[str, Any]]:
    """Embedder ids beside some states with their settings, by id; empty when nothing was embedded."""
    folder = embeddings_folder(states_root)
    found = {
        name: read_settings(storage, join(folder, name, "embedder.json")) for name in storage.folders(folder)
    }
    return {name: settings for name, settings in sorted(found.items()) if settings is not None}
