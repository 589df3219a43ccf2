"""Independent pieces of work, shared among Ray workers; a lost worker costs the piece it had."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from wealy_ray.errors import TransientError
from wealy_ray.pipelines.session import Cluster, find_fault

WORKER_DEATHS = 5
"""How often a piece is done again after its worker died."""


def share(
    work: Callable[..., Any],
    pieces: Sequence[Any],
    *common: Any,
    cluster: Cluster,
    cpus: float = 1,
    gpus: float = 0,
    max_workers: int | None = None,
    poll_s: float = 1.0,
) -> Iterator[tuple[Any, Any] | None]:
    """Calls `work(piece, *common)` for all pieces, in any order.

    Args:
        work: A plain function.
        pieces: What differs; small.
        *common: What all calls share; it goes through the object store once.
        cluster: What there is.
        cpus: CPUs of one call.
        gpus: GPUs of one call.
        max_workers: At most so many calls at a time.
        poll_s: None is yielded at least this often, so that progress can be shown.

    Yields:
        (piece, result) as they come.

    Raises:
        WealyError: What a call raised.
        TransientError: Workers died again and again.
    """
    import ray
    from ray.exceptions import RayError

    # a local session has more logical CPUs than there are; here every worker computes
    there = (os.cpu_count() or 1) if cluster.address == "local" else cluster.num_cpus
    at_a_time = max_workers or max(1, int(there // cpus) if not gpus else int(cluster.num_gpus // gpus))
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=WORKER_DEATHS)(_call)
    shared = [ray.put(value) for value in common]
    waiting = list(reversed(pieces))
    running: dict[Any, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                piece = waiting.pop()
                running[remote.remote(work, piece, shared)] = piece
            done, _ = ray.wait(list(running), timeout=poll_s)
            if not done:
                yield None
            for ref in done:
                yield running.pop(ref), ray.get(ref)
    except RayError as e:
        fault = find_fault(e)
        if fault is not None:
            raise fault from e
        reason = next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)
        if type(e).__name__.startswith("RayTaskError"):
            raise
        raise TransientError(
            f"workers were lost again and again: {reason}; run the same command again"
        ) from e
    finally:
        for ref in running:
            ray.cancel(ref, force=False)


_held: dict[str, Any] = {}
"""What the calls of this worker share, by reference: half a million track ids are not unpacked for every piece."""


def _call(work: Callable[..., Any], piece: Any, shared: Sequence[Any]) -> Any:
    import ray

    keys = [ref.hex() for ref in shared]
    for stale in _held.keys() - set(keys):
        del _held[stale]
    for key, ref in zip(keys, shared, strict=True):
        if key not in _held:
            _held[key] = ray.get(ref)
    return work(piece, *(_held[key] for key in keys))
