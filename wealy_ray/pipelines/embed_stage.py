"""The one stage of embedding, as Ray Data runs it: a group of tracks -> states -> vectors -> shard -> index rows.

A group is what its place in the index of the states makes it, never what happens to be left: all of its tracks go
through the network in one call and into one shard. So a run that was killed and went on leaves the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from wealy_ray.errors import StoreError
from wealy_ray.model.recipe import EmbedRecipe
from wealy_ray.storage import Storage
from wealy_ray.store import EmbedderSpec, StoreReader, TrackVectors, write_vectors

if TYPE_CHECKING:
    import ray.data

WORKER_RESTARTS = 3
"""How often a dead worker is started again within one pass; Ray's default is for ever."""
GROUPS_PER_WORKER = 2
"""The next group waits at the worker while it is busy."""

GROUP_SCHEMA = pa.schema([("track_id", pa.string())])


@dataclass(frozen=True)
class EmbedContext:
    """What a worker needs to know; picklable.

    Attributes:
        recipe: The recipe.
        spec: The embedder; a worker that finds another model refuses to work.
        states_index: Number of the index of the states.
        facts: For the metadata of every shard.
    """

    recipe: EmbedRecipe
    spec: EmbedderSpec
    states_index: int
    facts: dict[str, str]


def groups_of(wanted: pa.Table, todo: pa.Table, tracks_per_shard: int) -> list[pa.Table]:
    """What is to be done, in groups (`GROUP_SCHEMA`).

    Args:
        wanted: All tracks, by track_id; they say which tracks belong together.
        todo: Those of them that are left.
        tracks_per_shard: Tracks of a whole group.
    """
    left = set(todo["track_id"].to_pylist())
    ids = wanted["track_id"].to_pylist()
    cut = (ids[i : i + tracks_per_shard] for i in range(0, len(ids), tracks_per_shard))
    groups = ([track_id for track_id in group if track_id in left] for group in cut)
    return [pa.table({"track_id": group}, schema=GROUP_SCHEMA) for group in groups if group]


def build_dataset(groups: list[pa.Table], context: EmbedContext, gpus: float) -> ray.data.Dataset:
    """The plan: groups -> `EmbedStage` (actors) -> receipts.

    Args:
        groups: See `groups_of`; a block of Ray Data each.
        context: Of this run.
        gpus: GPUs of one worker.
    """
    import warnings

    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    # Ray 2.60 takes max_restarts in no other way; the version is pinned until it does
    warnings.simplefilter("ignore", RayDeprecationWarning)
    resources = context.recipe.resources
    dataset: Any = ray.data.from_arrow(groups)
    return dataset.map_batches(
        EmbedStage,
        fn_constructor_kwargs={"context": context, "use_gpu": gpus > 0},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=resources.cpus,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=resources.workers, max_tasks_in_flight_per_actor=GROUPS_PER_WORKER
        ),
        max_restarts=WORKER_RESTARTS,
        max_task_retries=WORKER_RESTARTS,
    )


class EmbedStage:
    """Holds the network; one call embeds one group and writes its shard.

    Args:
        context: Of this run.
        use_gpu: Whether the network runs on a GPU.

    Raises:
        StoreError: The model is gone, or was replaced since the run began.
    """

    def __init__(self, context: EmbedContext, use_gpu: bool) -> None:
        import torch

        from wealy_ray.model import load_model
        from wealy_ray.model.embedder import TrackEmbedder
        from wealy_ray.model.windows import StateWindows
        from wealy_ray.training.crops import CropReader, kinds_by_name

        recipe, spec = context.recipe, context.spec
        torch.set_num_threads(recipe.resources.cpus)
        self.context, self.storage = context, Storage(recipe.storage)
        model = load_model(recipe.model, self.storage)
        if model.config.digest != spec.model_digest:
            raise StoreError(
                f"the model {recipe.model} was replaced while it was used; run the same command again to embed with "
                "the new one"
            )
        self.reader = StoreReader.open(
            self.storage, recipe.store, spec.extractor_id, index_number=context.states_index
        )
        device = torch.device("cuda" if use_gpu else "cpu")
        windows = StateWindows.model_validate(spec.windows)
        self.embedder = TrackEmbedder(
            model.network.to(device), windows, recipe.resources.states_per_pass, device, recipe.precision
        )
        assert windows.size is not None, "windows are resolved first"
        reach = windows.size if windows.mode == "single" else np.iinfo(np.int64).max
        self.crops = CropReader(self.reader, reach, kinds_by_name(spec.kinds))
        self.facts = context.facts | {
            "numerics": f"{device.type}, {recipe.precision}, torch {torch.__version__}"
        }
        self.dim = model.config.model.output_dim

    def __call__(self, group: pa.Table) -> pa.Table:
        """Returns the receipt of the group's shard (`EMBEDDING_INDEX_SCHEMA`).

        Args:
            group: `GROUP_SCHEMA`.

        Raises:
            StoreError: States are damaged or gone.
        """
        track_ids = group["track_id"].to_pylist()
        rows = self.crops.rows(track_ids)
        num_states = self.crops.num_states(rows)
        there = np.flatnonzero(num_states).tolist()
        found = self.embedder.embed(
            [int(num_states[place]) for place in there],
            lambda number: self.crops.at(int(rows[there[number]]), 0),
        )
        vectors_of = dict(zip(there, found, strict=True))
        tracks = [
            self._result(track_id, int(num_states[place]), vectors_of.get(place))
            for place, track_id in enumerate(track_ids)
        ]
        root = self.context.spec.root(self.reader.root)
        return write_vectors(self.storage, root, tracks, self.dim, self.facts)

    def _result(self, track_id: str, num_states: int, vectors: np.ndarray | None) -> TrackVectors:
        row = self.reader.index.row(track_id)
        assert row is not None, "it was taken from this index"
        reason: tuple[str, str] | tuple[None, None] = (None, None)
        if row["status"] != "ok":
            reason = "extraction_failed", f"the track failed in extraction: {row['error_type']}"
        elif vectors is None:
            kinds = ", ".join(self.context.spec.kinds or ["any"])
            reason = "no_states", f"the track has no states of the kinds that the model is fed: {kinds}"
        elif not np.isfinite(vectors).all():
            reason = "invalid_embedding", "the model's vectors are NaN or infinite"
        if vectors is None or reason[0] is not None:
            vectors = np.zeros((0, self.dim), np.float32)
        return TrackVectors(track_id, row["checksum"], num_states, vectors, *reason)
