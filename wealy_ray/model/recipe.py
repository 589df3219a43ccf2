"""The recipe of an embedding: a store of states and a model in, vectors beside the states out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from wealy_ray.config import Settings, StorageSettings
from wealy_ray.model.windows import StateWindows


class EmbedResources(Settings):
    """Workers, and what each asks Ray for."""

    workers: PositiveInt = 1
    """Most at a time; on a cluster that scales, the first one works while the others start."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of one worker; None: 1 where the cluster has GPUs, else 0."""
    cpus: PositiveInt = 1
    """Of one worker; its threads."""
    states_per_pass: PositiveInt = 24_000
    """States that go through the network together, padding included: 16 windows of 1500."""
    tracks_per_shard: PositiveInt = 256
    """Tracks in one file; what is lost with a worker."""


class EmbedRecipe(Settings):
    """One embedding."""

    model: str
    """Model directory (any URI), see `wealy_ray.load_model`."""
    store: str
    """Store of states; vectors are written below it."""
    extractor_id: str | None = None
    """Which of the store's extractors; None: the only one."""
    index: PositiveInt | None = None
    """Which snapshot of the states; None: the latest."""
    windows: StateWindows = StateWindows()
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's products; changes vectors by rounding only, and is not part of the embedder id."""
    release: bool = True
    """Readers (`wealy search`) use these vectors from now on, once each track has its row."""
    storage: StorageSettings = StorageSettings()
    resources: EmbedResources = EmbedResources()
    publish_every_s: PositiveFloat = 120.0
    """An index is published this often while tracks are finished, and at the end."""
    progress_every_s: PositiveFloat = 30.0
    """Distance of two progress lines in a job log."""
    lease_s: PositiveFloat = 60.0
    """A driver waits this long for another one that seems to be alive, before it takes over."""
