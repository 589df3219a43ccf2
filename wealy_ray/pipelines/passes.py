"""Passes over the work that is left: all tracks together through Ray Data, suspects alone, until nothing is left.

A dead engine actor is started again a bounded number of times (its blocks run again). When Ray Data then gives
up, the tracks that its flight record names become suspects. A suspect runs alone in a fresh process; one that
kills that process `suspect_attempts` times becomes a failed row. Lost nodes are nobody's fault.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.errors import ClusterError, ReconciliationError, TransientError
from wealy_ray.pipelines.engine_stage import EngineStage, SoloExtractor
from wealy_ray.pipelines.flight import Suspects, clear_records, flying
from wealy_ray.pipelines.receipts import TICK_S, first_line, run_to_end
from wealy_ray.pipelines.session import Cluster, engine_gpus, find_fault
from wealy_ray.pipelines.stages import StageContext, decode_tracks, write_tracks
from wealy_ray.storage import Storage
from wealy_ray.store import TrackStates, write_shard

if TYPE_CHECKING:
    import ray.data

log = logging.getLogger(__name__)

FRUITLESS_PASSES = 3
"""Passes in a row that end in a lost engine or node, finish no track and find no suspect, before we stop."""
LOST_NODES = 10
"""Nodes that may be lost under tracks that run alone, before we stop."""
CRASHES_IN_A_ROW = 5
"""Tracks in a row that kill their engines alone, before we doubt the machines."""
NODE_DEATH_S = 30.0
"""Time in which Ray notices that a node is gone."""
BLOCKS_PER_ENGINE = 3
"""Blocks that an engine works on at the same time: the others fill the slots that the first one leaves."""


def build_dataset(work: pa.Table, context: StageContext, gpus: float) -> ray.data.Dataset:
    """The plan: work -> decode (tasks) -> engine (actors) -> write (tasks) -> receipts.

    Args:
        work: Rows in `WORK_SCHEMA`.
        context: Of this run.
        gpus: GPUs of one engine actor.
    """
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    # Ray 2.60 takes max_restarts in no other way; the version is pinned until it does
    warnings.simplefilter("ignore", RayDeprecationWarning)
    resources = context.recipe.resources
    pool = ray.data.ActorPoolStrategy(
        min_size=resources.engine_min,
        max_size=resources.engine_max,
        initial_size=resources.engine_initial or resources.engine_min,
        max_concurrent_calls_per_actor=BLOCKS_PER_ENGINE,
        max_tasks_in_flight_per_actor=BLOCKS_PER_ENGINE + 1,
    )
    dataset: Any = ray.data.from_arrow(work)
    return (
        dataset.repartition(target_num_rows_per_block=resources.tracks_per_block)
        .map_batches(
            decode_tracks,
            fn_kwargs={"context": context},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=resources.decode_cpus,
        )
        .map_batches(
            EngineStage,
            fn_constructor_kwargs={"context": context, "use_gpu": gpus > 0},
            batch_size=resources.tracks_per_block,
            batch_format="pyarrow",
            num_cpus=resources.engine_cpus,
            num_gpus=gpus or None,
            compute=pool,
            # Ray's default is to start a dead actor, and run its tracks, again for ever
            max_restarts=resources.engine_restarts,
            max_task_retries=resources.engine_restarts,
        )
        .map_batches(
            write_tracks,
            fn_kwargs={"context": context},
            batch_size=resources.tracks_per_shard,
            batch_format="pyarrow",
            num_cpus=resources.writer_cpus,
        )
    )


class PassRunner:
    """Runs passes for one driver.

    Args:
        context: Of this run.
        storage: Where the store lies.
        cluster: What to run on.
        on_receipt: Called with the index rows of each shard that was written, and with None about once a second.
    """

    def __init__(
        self,
        context: StageContext,
        storage: Storage,
        cluster: Cluster,
        on_receipt: Callable[[pa.Table | None], None],
    ) -> None:
        self.context, self.storage, self.on_receipt = context, storage, on_receipt
        self.gpus = engine_gpus(context.recipe.resources, cluster)
        self.suspects = Suspects(storage, context.root)

    def run_until_done(self, remaining: Callable[[], pa.Table]) -> None:
        """Runs passes until `remaining()` (rows in `WORK_SCHEMA`) is empty.

        Raises:
            WealyError: A fault of the run.
            TransientError: Engines or nodes keep dying and nothing gets done.
        """
        fruitless, left_before = 0, -1
        while (todo := remaining()).num_rows:
            self.suspects.clear(set(self.suspects.kills) - set(todo["track_id"].to_pylist()))
            suspected = pc.is_in(todo["track_id"], value_set=pa.array([*self.suspects.kills], pa.string()))
            if pc.any(suspected).as_py():
                self._run_alone(todo.filter(suspected))
                continue
            lost = self._run_together(todo)
            if lost is None and todo.num_rows == left_before:
                raise ReconciliationError(
                    f"{todo.num_rows} tracks came out of the pipeline without a row, the first is "
                    f"'{todo['track_id'][0].as_py()}'; run the same command again"
                )
            fruitless = fruitless + 1 if todo.num_rows == left_before else 0
            left_before = todo.num_rows
            if fruitless >= FRUITLESS_PASSES and not self.suspects.kills:
                raise TransientError(
                    f"engines or nodes died in {fruitless + 1} passes in a row and no track was finished ({lost}); "
                    "check the cluster, then run the same command again"
                )
        self.suspects.clear(set(self.suspects.kills))

    def _run_together(self, todo: pa.Table) -> str | None:
        """One pass of Ray Data.

        Returns:
            None when it ran to its end; else what was lost, with the suspects noted.
        """
        clear_records(self.storage, self.context.root)
        lost = run_to_end(build_dataset(todo, self.context, self.gpus), self.on_receipt)
        if isinstance(lost, _engine_died()):
            self._suspect(lost, set(todo["track_id"].to_pylist()))
        elif lost is not None:
            log.warning("a worker or node was lost (%s); starting another pass", first_line(lost))
        return None if lost is None else first_line(lost)

    def _suspect(self, died: Any, todo: set[str]) -> None:
        if died.preempted:
            log.warning("an engine's node was preempted; starting another pass")
            return
        suspects = flying(self.storage, self.context.root, died.actor_id) & todo
        self.suspects.add(suspects)
        log.warning("an engine died repeatedly; %d tracks it worked on run alone now", len(suspects))

    def _run_alone(self, todo: pa.Table) -> None:
        """Each track in a process that nobody else uses at the time."""
        solo: _Solo | None = None
        lost = crashed_in_a_row = 0
        for i in range(todo.num_rows):
            work, rows = todo.slice(i, 1), None
            track_id = work["track_id"][0].as_py()
            while rows is None:
                try:
                    solo = solo or self._start_solo()
                    rows = self._wait(solo.engine.extract.remote(work))
                except _engine_died() as e:
                    if solo is not None and not _is_lost(e) and self._node_stays(solo.node_id):
                        kills = self.suspects.killed_alone(track_id)
                        log.warning("track '%s' killed its engine, alone, %d times now", track_id, kills)
                        rows = self._give_up(work)
                    else:
                        lost += 1
                        log.warning(
                            "the node of the engine that ran '%s' alone was lost; not counted", track_id
                        )
                        if lost > LOST_NODES:
                            raise TransientError(
                                f"{lost} nodes were lost while single tracks ran; run the same command again"
                            ) from e
                    solo = None
            self.on_receipt(rows)
            crashed_in_a_row = (
                crashed_in_a_row + 1 if rows["error_type"][0].as_py() == "engine_crashed" else 0
            )
            if crashed_in_a_row >= CRASHES_IN_A_ROW:
                raise ClusterError(
                    f"{crashed_in_a_row} tracks in a row killed their engines, alone: rather a fault of the machines "
                    "than of the tracks; mend it, then run `wealy retry-failed`"
                )

    def _node_stays(self, node_id: str) -> bool:
        """Whether a node is still there after the time in which Ray notices that one is gone."""
        import ray

        if node_id == ray.get_runtime_context().get_node_id():
            return True  # we are still here ourselves
        end_s = time.monotonic() + NODE_DEATH_S
        while _node_is_alive(node_id):
            if time.monotonic() > end_s:
                return True
            self.on_receipt(None)
            time.sleep(TICK_S)
        return False

    def _start_solo(self) -> _Solo:
        import ray

        resources = self.context.recipe.resources
        remote = ray.remote(SoloExtractor).options(
            num_cpus=resources.engine_cpus, num_gpus=self.gpus or None, max_restarts=0
        )
        engine: Any = remote.remote(self.context, self.gpus > 0)
        return _Solo(engine, self._wait(engine.node_id.remote()))

    def _wait(self, result: Any) -> Any:
        """The value of an object reference; ticks meanwhile.

        Raises:
            WealyError: What the worker raised.
            RayActorError: The worker's process died.
        """
        import ray
        import ray.exceptions

        while not ray.wait([result], timeout=TICK_S)[0]:
            self.on_receipt(None)
        try:
            return ray.get(result)
        except ray.exceptions.RayTaskError as e:
            fault = find_fault(e)
            if fault is None:
                raise
            raise fault from e

    def _give_up(self, work: pa.Table) -> pa.Table | None:
        """The receipt of a failed row once the track has killed its engine too often; None before."""
        track_id, uri, etag = (work[name][0].as_py() for name in ("track_id", "audio_uri", "etag"))
        kills = self.suspects.kills[track_id]
        if kills < self.context.recipe.suspect_attempts:
            return None
        failed = TrackStates.failed(
            track_id,
            uri,
            "engine_crashed",
            f"the track killed its engine {kills} times, alone",
            manifest_etag=etag,
        )
        return write_shard(
            self.storage,
            self.context.root,
            [failed],
            extractor_id=self.context.extractor_id,
            epoch=self.context.epoch,
            numerics={},
        )


@dataclass(frozen=True)
class _Solo:
    """An engine that runs one track at a time, and where it runs."""

    engine: Any
    node_id: str


def _engine_died() -> Any:
    import ray.exceptions

    return ray.exceptions.RayActorError


def _is_lost(died: Any) -> bool:
    """Whether a node or the way to it is gone, rather than the process."""
    import ray.exceptions

    return bool(died.preempted) or isinstance(died, ray.exceptions.ActorUnavailableError)


def _node_is_alive(node_id: str) -> bool:
    import ray

    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
