"""Connecting to Ray, and telling what a failed Ray job died of."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from wealy_ray import errors
from wealy_ray.config import ExtractResources
from wealy_ray.errors import ClusterError, WealyError

log = logging.getLogger(__name__)
E = TypeVar("E", bound=BaseException)

LOCAL_MIN_CPUS = 8
"""Logical CPUs of a local session: with fewer, stages that each hold a share starve one another."""
NO_PROGRESS_S = 24 * 3600
"""Ray Data gives up after half an hour without progress; waiting for spot GPUs may take longer."""


@dataclass(frozen=True)
class Cluster:
    """What a job runs on.

    Attributes:
        address: `local`, or the address of the cluster.
        num_cpus: Logical CPUs now.
        num_gpus: GPUs now.
        num_nodes: Nodes alive now.
    """

    address: str
    num_cpus: float
    num_gpus: float
    num_nodes: int


def connect(workers_log: str | None = None) -> Cluster:
    """Joins the cluster named by RAY_ADDRESS (set inside `ray job submit`), else starts a local session.

    Args:
        workers_log: Least level of what Ray's own parts in worker processes say, e.g. `ERROR`; None: Ray's choice.

    Raises:
        ClusterError: Ray cannot be reached or started.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        # whether Ray asks for a token depends on what ran before on this machine: a private session needs none
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if not ray.is_initialized():
        handler: Any = signal.getsignal(signal.SIGTERM)
        _init(address, workers_log)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own one would end us before we publish
    _configure_data()
    resources = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Cluster(address, resources.get("CPU", 0.0), resources.get("GPU", 0.0), nodes)


def _init(address: str, workers_log: str | None) -> None:
    import ray

    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if address == "local":
        options |= {"num_cpus": max(LOCAL_MIN_CPUS, os.cpu_count() or 1), "include_dashboard": False}
        quoted = shlex.quote(sys.executable)
        if (
            quoted != sys.executable
        ):  # Ray 2.60 does not quote it for workers with an environment, as Ray Train's
            options["runtime_env"] = {"py_executable": quoted}
    if workers_log is not None:
        options["logging_config"] = ray.LoggingConfig(log_level=workers_log)
    try:
        ray.init(address=address, **options)
    except Exception as e:  # Ray raises many kinds here; each means the same to the user
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ClusterError(f"cannot connect to Ray at '{address}': {reason}") from e


def _configure_data() -> None:
    import ray.data

    # what fails is raised and said by us, in one sentence
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks; ours count tracks
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S


def gpus_each(asked: float | None, cluster: Cluster) -> float:
    """GPUs of one worker: what the recipe asks for, else one where the cluster has any."""
    if asked is not None:
        return asked
    return 1.0 if cluster.num_gpus >= 1 else 0.0


def engine_gpus(resources: ExtractResources, cluster: Cluster) -> float:
    """GPUs of one engine actor."""
    return gpus_each(resources.engine_gpus, cluster)


def check_resources(resources: ExtractResources, cluster: Cluster) -> None:
    """Refuses an extraction that could never be scheduled, see `check_room`."""
    cpus = resources.engine_cpus * resources.engine_min + resources.decode_cpus + resources.writer_cpus
    check_room(
        cluster,
        engine_gpus(resources, cluster) * resources.engine_min,
        cpus,
        workers="engines",
        fewer_gpus="set resources.engine_gpus: 0 to run on CPUs",
        fewer_cpus="lower resources.engine_cpus or resources.engine_min",
    )


def check_room(
    cluster: Cluster, gpus: float, cpus: float, *, workers: str, fewer_gpus: str, fewer_cpus: str
) -> None:
    """Refuses what could never be scheduled on a fixed, local session.

    A cluster may scale up, so nothing can be said there.

    Args:
        cluster: What there is.
        gpus: GPUs of all workers together.
        cpus: CPUs of all stages together.
        workers: What they are called.
        fewer_gpus: How to ask for less, in words.
        fewer_cpus: The same for CPUs.

    Raises:
        ClusterError: The stages need more CPUs or GPUs than there are.
    """
    if cluster.address != "local":
        return
    if gpus > cluster.num_gpus:
        raise ClusterError(
            f"the {workers} need {gpus:g} GPUs, this machine has {cluster.num_gpus:g}; {fewer_gpus}"
        )
    if cpus > cluster.num_cpus:
        raise ClusterError(
            f"the stages need {math.ceil(cpus)} CPUs at least, this session has {cluster.num_cpus:g}; {fewer_cpus}"
        )


def find_cause(error: BaseException, kind: type[E]) -> E | None:
    """The first exception of class `kind` behind `error`, through Ray's wrappers."""
    # Ray's wrapper is made an instance of what it wraps, but speaks in tracebacks
    found = (
        e for e in _causes(error) if isinstance(e, kind) and not type(e).__name__.startswith("RayTaskError")
    )
    return next(found, None)


def find_fault(error: BaseException) -> WealyError | None:
    """The fault of the run that a worker raised, through Ray's wrappers.

    Ray Data wraps what a stage raises, and pickling drops the cause: then only the text of the traceback is left,
    in which a fault of ours is one line.
    """
    fault = find_cause(error, WealyError)
    if fault is not None:
        return fault
    faults = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    faults |= {"ObjectForbiddenError": errors.StorageError, "ObjectMissingError": errors.StorageError}
    said = re.findall(r"^wealy_ray\.[\w.]*?(\w+): (.+)$", str(error), re.MULTILINE)
    for name, sentence in reversed(said):
        kind = faults.get(name)
        if kind is not None and issubclass(kind, WealyError) and kind is not errors.TrackError:
            return kind(sentence)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    queue, seen = [error], set()
    while queue:
        e = queue.pop(0)
        if id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        # RayTaskError keeps the worker's exception in `cause`
        queue += [
            c for c in (getattr(e, "cause", None), e.__cause__, e.__context__) if isinstance(c, BaseException)
        ]
