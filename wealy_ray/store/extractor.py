"""The extractor's identity: a digest of everything that changes the numbers.

States of different ids never mix. Device, dtype and batch sizes are not part of it: such states are
comparable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wealy_ray.errors import StoreError
from wealy_ray.storage import ObjectMissingError, Storage, join

NUMERICS_VERSION = 1
"""Bumped by hand when golden states drift, and only then."""


@dataclass(frozen=True)
class ExtractorSpec:
    """What changes the numbers; every value can be written as JSON.

    Attributes:
        weights_digest: Digest of the Whisper weights.
        max_duration_s: A track is cut here.
        windows: The window plan and its options, e.g. {"plan": "fixed", "hop_s": 25.0}.
        decode: Decode options: language, task, timestamps, max_tokens.
        sample_rate_hz: Rate at which Whisper hears.
        resampler: Who brings audio to that rate.
        state_layer: Whose output is stored.
        numerics_version: See `NUMERICS_VERSION`.
    """

    weights_digest: str
    max_duration_s: float
    windows: Mapping[str, Any]
    decode: Mapping[str, Any]
    sample_rate_hz: int = 16_000
    resampler: str = "libswresample, 16 bits"
    state_layer: str = "decoder.ln"
    numerics_version: int = NUMERICS_VERSION

    @property
    def extractor_id(self) -> str:
        """First 16 hexadecimal digits of SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()[:16]

    def root(self, store: str) -> str:
        """`<store>/<extractor_id>`."""
        return join(store, self.extractor_id)

    def ensure(self, storage: Storage, store: str) -> str:
        """Writes `extractor.json` if it is absent, and compares it when it is there.

        Args:
            storage: Where the store is.
            store: Folder of the store.

        Returns:
            `<store>/<extractor_id>`, the root of shards and indexes.

        Raises:
            StoreError: A file is there and says something else.
        """
        uri = join(self.root(store), "extractor.json")
        if not storage.write_if_absent(uri, (json.dumps(_plain(asdict(self)), indent=2) + "\n").encode()):
            found = read_settings(storage, uri)
            if found is None or canonical_json(found) != canonical_json(asdict(self)):
                raise StoreError(
                    f"{uri} does not describe extractor {self.extractor_id}: it was changed or damaged; "
                    "restore it, or use another store folder"
                )
        return self.root(store)


def list_extractors(storage: Storage, store: str) -> dict[str, dict[str, Any]]:
    """Extractor ids of a store with their settings, by id; empty when nothing is there."""
    found = {
        name: read_settings(storage, join(store, name, "extractor.json")) for name in storage.folders(store)
    }
    return {name: settings for name, settings in sorted(found.items()) if settings is not None}


def read_settings(storage: Storage, uri: str) -> dict[str, Any] | None:
    """The settings in a file; None when it is missing, and empty when it is damaged."""
    try:
        found = json.loads(storage.read(uri))
    except ObjectMissingError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def canonical_json(settings: Any) -> str:
    """The same text for equal settings."""
    return json.dumps(_plain(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON-able, with 25.0 and 25 made equal."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
