"""`wealy train`: a group of Ray Train workers trains; what it goes on from and what it leaves lies in the run's folder.

Ray Train starts the workers, makes them a process group, and starts a new group when one dies. Checkpoints are our own
(`training.checkpoint`): they are written whole or not at all, on any storage, and a driver that comes later finds them
without Ray's snapshot of its own run, which may miss the last ones.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

from wealy_ray.errors import ReconciliationError, StoreError, TransientError, WealyError
from wealy_ray.model import load_model
from wealy_ray.pipelines.board import BoardEar, pin_board
from wealy_ray.pipelines.session import Cluster, check_room, connect, find_fault
from wealy_ray.progress import Line
from wealy_ray.report.run_record import RunRecord, new_run_id
from wealy_ray.storage import join
from wealy_ray.store import Lease
from wealy_ray.training.job import Job
from wealy_ray.training.keeper import Keeper
from wealy_ray.training.loop import Loop, Rank
from wealy_ray.training.recipe import TrainRecipe
from wealy_ray.training.summary import TrainSummary
from wealy_ray.training.tracking import build_trackers

log = logging.getLogger(__name__)

STOP_S = 120.0
"""How long an interrupted driver waits for its workers to save."""
POLL_S = 0.5
LOST_PEER = ("gloo", "nccl", "connection", "socket", "process group")
"""Words in what torch says when another rank is gone."""


def run_train(recipe: TrainRecipe) -> TrainSummary:
    """Trains, or goes on with a training that was stopped.

    Args:
        recipe: The job.

    Raises:
        WealyError: See `wealy_ray.errors`; the last checkpoint is what the same command goes on from.
    """
    began_s = time.monotonic()
    job = Job.open(recipe)
    summary = TrainSummary(job.model_uri, job.counts())
    if job.is_done:
        return _reconciled(job, summary)
    # Ray Train's guards complain every second where there is no dashboard; what fails is said by us
    cluster = connect(workers_log="CRITICAL")
    _check_room(job.recipe, cluster)
    # nothing was written up to here
    lease = Lease(job.storage, recipe.out, new_run_id(), recipe.lease_s)
    lease.acquire(log.warning)
    try:
        if job.is_done:  # whom we waited for has ended it
            return _reconciled(job, summary)
        job.begin()
        return _Run(job, cluster, summary, began_s).execute()
    finally:
        lease.release()


@dataclass
class _Run:
    """One driver at work on one training."""

    job: Job
    cluster: Cluster
    summary: TrainSummary
    began_s: float

    def execute(self) -> TrainSummary:
        job, summary = self.job, self.summary
        record = RunRecord(
            job.storage,
            join(job.recipe.out, "run.json"),
            job="train",
            cluster=vars(self.cluster),
            recipe=job.recipe.model_dump(mode="json"),
            manifest_digest=job.manifest.digest,
            extractor_id=job.reader.extractor_id,
            index=job.reader.index.number,
            counts=summary.counts,
        )
        record.write()
        try:
            self._train()
            _reconciled(job, summary)
        except BaseException as e:
            summary.wall_s = time.monotonic() - self.began_s
            record.end(e, **summary.facts())
            raise
        summary.wall_s = time.monotonic() - self.began_s
        record.end(None, **summary.facts())
        return summary

    def _train(self) -> None:
        import ray

        board, line = pin_board(), Line(self.job.recipe.progress_every_s)
        thread = _Fit(self.job.recipe, board, is_local=self.cluster.address == "local")
        thread.start()

        def look() -> bool:
            pulse, is_over = ray.get(board.look.remote())
            if pulse is not None:
                self.summary.note(pulse)
                line.tick(pulse.line)
            return is_over

        try:
            while not thread.ended.wait(POLL_S):
                look()
            is_over = look()
        except KeyboardInterrupt:
            self._stop(thread, board)
            raise
        finally:
            if self.summary.pulse is not None:
                line.close(self.summary.pulse.line)
        fault = ray.get(board.fault.remote())
        if fault is not None:
            raise fault
        if thread.error is not None:
            raise _as_ours(thread.error) from thread.error
        if not is_over:
            raise ReconciliationError(
                f"the workers ended before the last epoch of {self.job.recipe.out}; run the same command again"
            )

    def _stop(self, thread: _Fit, board: Any) -> None:
        """Lets the workers save; they do so after the step that they are at."""
        if self.summary.pulse is None:
            return  # no step was made: there is nothing to save
        log.warning("stopping: the workers save first (interrupt again to leave at once)")
        before = self.job.checkpoints.places()
        board.stop.remote()
        thread.ended.wait(STOP_S)
        after = self.job.checkpoints.places()
        if after[-1:] == before[-1:]:  # when the signal went to Ray's processes too, they are gone
            counts = (
                f"the last checkpoint, {after[-1].name}, counts" if after else "there is no checkpoint yet"
            )
            log.warning("the workers have not saved: %s", counts)


class _Fit(threading.Thread):
    """Ray Train's `fit`, which gives no word before it ends, on a thread of its own.

    Attributes:
        ended: To be waited for: before Python 3.13 a `join` that a signal interrupts takes the thread for ended.
        error: Of `fit`.
    """

    def __init__(self, recipe: TrainRecipe, board: Any, *, is_local: bool) -> None:
        super().__init__(name="fit", daemon=True)
        self.recipe, self.board, self.is_local = recipe, board, is_local
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            # Ray keeps notes on its own run there; ours are in `out`
            with tempfile.TemporaryDirectory(prefix="wealy-train-", ignore_cleanup_errors=True) as notes:
                _trainer(self.recipe, self.board, notes, is_local=self.is_local).fit()
        except BaseException as e:
            self.error = e
        finally:
            self.ended.set()


def _trainer(recipe: TrainRecipe, board: Any, notes: str, *, is_local: bool) -> Any:
    # our paths may be relative to the folder that the driver was started in
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    if is_local:  # nobody takes this machine's node away
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = recipe.resources
    each: dict[str, float] = {"CPU": float(resources.cpus)} | (
        {"GPU": resources.gpus} if resources.gpus else {}
    )
    scaling: dict[str, Any] = {"num_workers": resources.workers, "use_gpu": resources.gpus > 0}
    run: dict[str, Any] = {  # the types that Ray declares are those of the Train before V2
        "name": "wealy",
        "storage_path": notes,
        "failure_config": FailureConfig(max_failures=resources.max_failures),
        "logging_config": LoggingConfig(log_level="CRITICAL"),  # errors reach us, and are said once
    }
    return TorchTrainer(
        train_rank,
        train_loop_config={"recipe": recipe, "board": board},
        scaling_config=ScalingConfig(resources_per_worker=each, **scaling),
        run_config=RunConfig(**run),
    )


def train_rank(config: dict[str, Any]) -> None:
    """What each worker of a group runs."""
    import ray

    board = config["board"]
    if ray.get(board.fault.remote()) is not None:
        return  # a rank of the last group found out why no group can do it; all end, and the driver says why
    try:
        _train_rank(config["recipe"], board)
    except TransientError:
        raise  # another group may have more luck
    except WealyError as e:
        ray.get(board.blame.remote(e))
        raise


def _train_rank(recipe: TrainRecipe, board: Any) -> None:
    import ray
    import ray.train
    import ray.train.torch
    import torch

    _speak_up()
    torch.set_num_threads(recipe.resources.cpus)
    context = ray.train.get_context()
    number = context.get_world_rank()
    rank = Rank(number, context.get_world_size(), ray.train.torch.get_device())
    job = Job.open(recipe)
    keeper = Keeper(job, BoardEar(board, is_first=not number))
    loop = Loop(job.recipe, job.splits, rank, keeper)
    found = _agreed(rank, job.checkpoints.read_latest)
    if found is not None:
        loop.load(*found)
    if not number:
        first = loop.progression.epoch
        names, settings = recipe.tracking, recipe.model_dump(mode="json")
        keeper.trackers = build_trackers(names, settings, job.storage, recipe.out, first)
    if loop.run() and not number:
        job.finish(loop)
        ray.get(board.finish.remote())


def _speak_up() -> None:
    """Lets our own warnings through to the driver's log, see `connect`."""
    ours = logging.getLogger("wealy_ray")
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())
        ours.setLevel(logging.INFO)
        ours.propagate = False


def _agreed(rank: Rank, read: Any) -> Any:
    """What the first rank reads, on all ranks: two might find different checkpoints."""
    import torch.distributed as dist

    if rank.world_size == 1:
        return read()
    told: list[Any] = [None]
    if not rank.number:
        try:
            told = [read()]
        except WealyError as e:
            told = [e]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], WealyError):
        raise told[0]
    return told[0]


def _as_ours(error: BaseException) -> BaseException:
    """What a failed `fit` means."""
    import ray.exceptions

    fault = find_fault(error)
    if fault is not None:
        return fault
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    for failure in failures:
        words = str(failure).lower()
        if not isinstance(failure, ray.exceptions.RayError) and not any(w in words for w in LOST_PEER):
            return failure  # a defect of ours
    reason = next((line for line in str(failures[0]).splitlines() if line.strip()), type(error).__name__)
    return TransientError(
        f"workers were lost more often than resources.max_failures allows ({reason.strip()}); run the same command "
        "again to go on from the last checkpoint"
    )


def _check_room(recipe: TrainRecipe, cluster: Cluster) -> None:
    resources = recipe.resources
    workers = resources.least_workers
    check_room(
        cluster,
        workers * resources.gpus,
        workers * resources.cpus,
        workers=f"{workers} workers",
        fewer_gpus="set resources.gpus: 0 to train on CPUs",
        fewer_cpus="lower resources.cpus or resources.workers",
    )


def _reconciled(job: Job, summary: TrainSummary) -> TrainSummary:
    """Makes sure that what a finished training leaves fits together.

    Raises:
        ReconciliationError: It does not.
    """
    out, history = job.recipe.out, job.history()
    try:
        model = load_model(job.model_uri, job.storage)
    except StoreError as e:
        raise StoreError(
            f"{e}; remove {job.model_uri} and run the same command again: it is written anew from the checkpoints"
        ) from e
    epochs = [round(entry["epoch"]) for entry in history]
    if epochs != list(range(1, len(epochs) + 1)):
        raise ReconciliationError(
            f"{out}/history.json does not name each epoch once; remove {out} and train anew"
        )
    measured = {round(entry["epoch"]): entry["map"] for entry in history if "map" in entry}
    best = max(measured, key=lambda epoch: measured[epoch])
    if model.config.metrics.get("validation_map") != measured[best]:
        raise ReconciliationError(
            f"the model in {job.model_uri} is not that of the best epoch, {best}; remove {out} and train anew"
        )
    summary.epochs, summary.best_map, summary.best_epoch = len(epochs), measured[best], best
    summary.loss, summary.parameters = history[-1]["loss"], sum(p.numel() for p in model.network.parameters())
    return summary
