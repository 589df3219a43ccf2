"""What is known of the network behind a system's vectors; for people and a report's diagnostics, never for a number."""

from __future__ import annotations

import json
import logging
from typing import Any

from wealy_ray.errors import WealyError
from wealy_ray.storage import ObjectMissingError, Storage, join
from wealy_ray.store import kept_model

log = logging.getLogger(__name__)


def facts_of_embeddings(storage: Storage, uri: str) -> dict[str, Any] | None:
    """Facts of embeddings whose folder, or the one above, has an `embedder.json` that names a model directory.

    Args:
        storage: Access.
        uri: Of the vectors.

    Returns:
        `network` (kind), `extractor_id`, and `data`, what the model directory says it was trained on; None for
        vectors from elsewhere, or where the model is gone.
    """
    folder = uri.rstrip("/")
    try:
        config = None
        for place in (folder, folder.rpartition("/")[0]):
            embedder = _read(storage, place, "embedder.json")
            if embedder:
                kept = _read(storage, kept_model(place), "config.json")
                config = kept or _read(storage, str(embedder["model"]), "config.json")
                break
        if config is None:
            return None
        return {
            "network": config["model"]["kind"],
            "extractor_id": config["extractor_id"],
            "data": config.get("data") or {},
        }
    except (WealyError, ValueError, KeyError, TypeError) as e:
        log.warning("nothing is known of the network behind %s (%s: %s)", uri, type(e).__name__, e)
        return None


def _read(storage: Storage, folder: str, name: str) -> Any:
    if not folder:
        return None
    try:
        return json.loads(storage.read(join(folder, name)))
    except ObjectMissingError:
        return None
