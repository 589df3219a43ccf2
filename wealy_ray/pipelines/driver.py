"""One driver at work on one index, whatever it computes: claim, passes, receipts, publishing, reconciling, record."""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Callable
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.errors import FencedError, TransientError
from wealy_ray.pipelines.ledger import Ledger
from wealy_ray.pipelines.session import Cluster
from wealy_ray.progress import Progress
from wealy_ray.report.run_record import RunRecord

log = logging.getLogger(__name__)

Remaining = Callable[[], pa.Table]
"""Tracks that have no row yet."""
OnReceipt = Callable[[pa.Table | None], None]
"""Takes a receipt; None once in a while."""


class Summary(Protocol):
    """What every run counts."""

    adopted: int
    work_tracks: int
    work_s: float
    wall_s: float


class Times(Protocol):
    """What a recipe says about reporting."""

    publish_every_s: float
    progress_every_s: float


class Driver(abc.ABC):
    """Base of the drivers.

    Args:
        run_id: Of this run.
        ledger: What is done, and what is to do.
        summary: Filled in.
        times: The recipe.
    """

    def __init__(self, run_id: str, ledger: Ledger, summary: Summary, times: Times) -> None:
        self.run_id = run_id
        self._ledger, self._summary, self._times = ledger, summary, times

    @abc.abstractmethod
    def connect(self) -> Cluster:
        """A cluster with room for the job."""

    @abc.abstractmethod
    def record(self, cluster: Cluster) -> RunRecord:
        """The run's record, not written yet."""

    @abc.abstractmethod
    def run_until_done(self, cluster: Cluster, remaining: Remaining, on_receipt: OnReceipt) -> None:
        """Passes over what is left, until nothing is."""

    @abc.abstractmethod
    def note(self, rows: pa.Table) -> tuple[pa.Table, float]:
        """Counts a receipt; returns it as the index takes it, and its seconds of audio."""

    @abc.abstractmethod
    def reconcile(self) -> None:
        """Tracks in = ok + failed, each once, in the index as it lies in the store."""

    def execute(self, cluster: Cluster | None, began_s: float) -> None:
        """Works until every track has its row.

        Args:
            cluster: Where, if it is known already.
            began_s: When the run began, on the monotonic clock.
        """
        record: RunRecord | None = None
        error: BaseException | None = None
        try:
            if self._ledger.todo().num_rows:
                if lost := self._ledger.num_lost():
                    log.warning("%d tracks lie in shards that are gone: they are worked on again", lost)
                self._ledger.claim(self.run_id)
                cluster = cluster or self.connect()
                record = self.record(cluster)
                record.write()
                self._work(cluster)
            self.reconcile()
        except BaseException as e:
            error = e
            raise
        finally:
            self._summary.wall_s = time.monotonic() - began_s
            if record is not None:
                record.end(error, **{k: v for k, v in vars(self._summary).items() if k != "root"})

    def _work(self, cluster: Cluster) -> None:
        ledger, summary, times = self._ledger, self._summary, self._times
        work_began_s = time.monotonic()
        total = ledger.wanted.num_rows
        progress = Progress(total, ledger.done_before, interval_s=times.progress_every_s)

        def remaining() -> pa.Table:
            todo = ledger.remaining()
            progress.done = total - todo.num_rows  # adopted tracks count, tracks that ran twice do not
            return todo

        def on_receipt(rows: pa.Table | None) -> None:
            if rows is not None:
                rows, audio_s = self.note(rows)
                ledger.receive(rows)
                summary.work_tracks += rows.num_rows
                progress.add(rows.num_rows, pc.sum(pc.equal(rows["status"], "failed")).as_py() or 0, audio_s)
            progress.tick()
            ledger.publish(at_least_every_s=times.publish_every_s)

        try:
            self.run_until_done(cluster, remaining, on_receipt)
        except (FencedError, TransientError):
            raise  # the index is not ours any more, or out of reach; the next run adopts what is not in it
        except BaseException:
            ledger.publish()
            raise
        finally:
            summary.work_s = time.monotonic() - work_began_s
            summary.adopted = ledger.adopted
            progress.close()
