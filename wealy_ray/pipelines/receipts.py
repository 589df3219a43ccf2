"""Receipts of a Ray Data pipeline, one by one; and what it died of, when it did."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from wealy_ray.pipelines.session import find_cause, find_fault

if TYPE_CHECKING:
    import ray.data

TICK_S = 1.0


def run_to_end(dataset: ray.data.Dataset, on_receipt: Callable[[pa.Table | None], None]) -> Any:
    """Runs a pipeline, and gives its rows away as they come.

    Args:
        dataset: Its last stage returns receipts.
        on_receipt: Called with each receipt, and with None about once a second.

    Returns:
        None when it ran to its end; else the RayError that tells what was lost: an actor that died too often, or a
        node, a worker, an object that is gone.

    Raises:
        WealyError: A fault of the run, which a stage raised.
    """
    import ray.exceptions

    try:
        with contextlib.closing(_receipts(dataset)) as receipts:
            for rows in receipts:
                on_receipt(rows)
    except Exception as e:
        fault = find_fault(e)
        if fault is not None:
            raise fault from e
        lost: Any = find_cause(e, ray.exceptions.RayActorError)
        if lost is None and find_cause(e, ray.exceptions.UserCodeException) is None:
            lost = find_cause(e, ray.exceptions.RayError)
        if lost is None:  # a stage raised what is no fault of ours: trying again would hide a defect
            raise
        return lost
    return None


def _receipts(dataset: ray.data.Dataset) -> Generator[pa.Table | None]:
    """Receipts as they come, and None about once a second, so that the driver can tick meanwhile."""
    results: queue.Queue[pa.Table | BaseException | None] = queue.Queue()

    def consume() -> None:
        try:
            for rows in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                results.put(rows)
        except BaseException as e:
            results.put(e)
        else:
            results.put(None)

    thread = threading.Thread(target=consume, name="receipts", daemon=True)
    thread.start()
    try:
        while True:
            try:
                result = results.get(timeout=TICK_S)
            except queue.Empty:
                yield None
                continue
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        # when we stop early, the pipeline must stop as well (Ray has no public way to say so)
        executor = getattr(dataset, "_current_executor", None)
        if executor is not None and thread.is_alive():
            executor.shutdown(force=True)


def first_line(error: BaseException) -> str:
    """What an error says, cut to its first line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
