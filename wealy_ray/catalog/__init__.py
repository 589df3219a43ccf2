"""Data-set metadata -> manifest: which tracks there are, where their audio lies, which clique they belong to."""

from wealy_ray.catalog.audio_folder import manifest_from_folder
from wealy_ray.catalog.manifest import (
    MANIFEST_SCHEMA,
    Manifest,
    read_manifest,
    tracks_of_split,
    validate,
    write_manifest,
)
from wealy_ray.catalog.tabular import manifest_from_rows

__all__ = [
    "MANIFEST_SCHEMA",
    "Manifest",
    "manifest_from_folder",
    "manifest_from_rows",
    "read_manifest",
    "tracks_of_split",
    "validate",
    "write_manifest",
]
