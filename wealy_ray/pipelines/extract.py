"""Extraction: manifest -> store. The driver: prepares, runs passes over Ray Data, publishes, reconciles.

    prepare   read the manifest, load the weights, name the extractor, find what is done      (writes nothing)
    claim     lease, index claim, adoption of finished shards that no index names
    passes    Ray Data over what is left; receipts -> index; suspects of a dead engine run alone
    reconcile tracks in = ok + failed, each once

Everything that must survive the driver lies in the store; running the same recipe again goes on from there.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.catalog import Manifest, read_manifest
from wealy_ray.config import ExtractRecipe
from wealy_ray.errors import (
    FencedError,
    ReconciliationError,
    TooManyFailuresError,
    TransientError,
    WealyError,
)
from wealy_ray.pipelines.passes import PassRunner
from wealy_ray.pipelines.stages import WORK_SCHEMA, StageContext
from wealy_ray.progress import Progress
from wealy_ray.report.extract_summary import ExtractSummary
from wealy_ray.report.run_record import RunRecord, now
from wealy_ray.report.status import value_counts
from wealy_ray.report.tables import counts_in_words
from wealy_ray.storage import ObjectForbiddenError, Storage, join, scheme_of
from wealy_ray.store import (
    ExtractorSpec,
    Index,
    IndexWriter,
    Lease,
    adopt,
    read_latest,
    split_work,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A checked job that has written nothing yet."""

    recipe: ExtractRecipe
    storage: Storage
    manifest: Manifest
    spec: ExtractorSpec

    @property
    def root(self) -> str:
        """`<store>/<extractor-id>`."""
        return self.spec.root(self.recipe.store)


def prepare(recipe: ExtractRecipe) -> Prepared:
    """Checks everything that can be checked before anything is written.

    Raises:
        ManifestError, StorageError, ModelError, TransientError: With one sentence each.
    """
    from wealy_ray.whisper import load_whisper

    storage = Storage(recipe.storage)
    manifest = read_manifest(storage, recipe.manifest)
    storage.check_folder(recipe.store)
    _check_audio_buckets(storage, manifest)
    loaded = load_whisper(recipe.model, read_bytes=storage.read)
    spec = ExtractorSpec(
        weights_digest=loaded.digest,
        max_duration_s=recipe.audio.max_duration_s,
        windows={"plan": "fixed", **recipe.windows.model_dump()},
        decode=recipe.decode.model_dump(),
    )
    return Prepared(recipe, storage, manifest, spec)


def _check_audio_buckets(storage: Storage, manifest: Manifest) -> None:
    """A missing bucket or bad credentials stop the run; a bucket that may only be read, not listed, is fine."""
    uris = manifest.table["audio_uri"].to_pylist()
    for bucket in sorted({"/".join(uri.split("/", 3)[:3]) for uri in uris if scheme_of(uri) == "s3"}):
        try:
            next(storage.list(join(bucket, ".wealy-no-such-prefix")), None)
        except ObjectForbiddenError:
            log.info("%s cannot be listed; its objects are tried one by one", bucket)


def run_extract(recipe: ExtractRecipe, *, retry_failed: bool = False) -> ExtractSummary:
    """Runs extraction until every track of the manifest has its row.

    Args:
        recipe: The job.
        retry_failed: Work on the tracks that failed in earlier runs, and on nothing else.

    Raises:
        WealyError: See `wealy_ray.errors`; all finished work is in the store.
    """
    began_s = time.monotonic()
    job = prepare(recipe)
    job.spec.ensure(job.storage, recipe.store)
    run_id = f"{now().replace(':', '')}-{uuid.uuid4().hex[:6]}"
    # the last words of a run that ends because storage is gone must not wait for storage
    hasty = Storage(recipe.storage.model_copy(update={"retry_for_s": min(recipe.storage.retry_for_s, 5.0)}))
    lease = Lease(hasty, job.root, run_id, recipe.lease_s)
    lease.acquire(log.warning)
    try:
        run = _Run(job, run_id, retry_failed, hasty)
        return run.execute(began_s)
    finally:
        lease.release()


class _Run:
    """One driver at work on one store."""

    def __init__(self, job: Prepared, run_id: str, retry_failed: bool, hasty: Storage) -> None:
        self.job, self.run_id, self.retry_failed, self.hasty = job, run_id, retry_failed, hasty
        self.recipe, self.storage, self.root = job.recipe, job.storage, job.root
        table = job.manifest.table.select(["track_id", "audio_uri", "etag"])
        index = read_latest(self.storage, self.root)
        if retry_failed:
            table = _failed_of(table, index)
        self.wanted = table.cast(WORK_SCHEMA)
        self.index = index
        self.done_before = int(split_work(self.wanted, index, retry_failed=retry_failed).sum())
        self.retried: set[str] = set()
        self.writer: IndexWriter | None = None
        self.pending: list[pa.Table] = []
        self.published_s = time.monotonic()

    def execute(self, began_s: float) -> ExtractSummary:
        summary = ExtractSummary(self.root, len(self.job.manifest), done_before=self.done_before)
        todo = self._todo()
        if todo.num_rows:
            self._claim()
            summary.adopted = self._adopt(todo)
            todo = self._todo()
        record = None
        if self.writer is not None:
            record = self._record()
            record.write(adopted=summary.adopted)
        try:
            if todo.num_rows:
                self._work(todo, summary)
            self._reconcile(summary)
        except BaseException as e:
            self._end(record, summary, e, began_s)
            raise
        self._end(record, summary, None, began_s)
        return summary

    def _todo(self) -> pa.Table:
        index = self.writer.index if self.writer else self.index
        done = split_work(self.wanted, index, retry_failed=self.retry_failed)
        todo = self.wanted.filter(pa.array(~done))
        if self.retried:  # a track that failed again is done for this run
            again = pc.is_in(todo["track_id"], value_set=pa.array(sorted(self.retried)))
            todo = todo.filter(pc.invert(again))
        return todo

    def _claim(self) -> None:
        self.writer = IndexWriter.claim(
            self.storage, self.root, manifest_digest=self.job.manifest.digest, run_id=self.run_id
        )

    def _adopt(self, todo: pa.Table) -> int:
        assert self.writer is not None
        found = adopt(
            self.storage,
            self.root,
            self.writer.index,
            todo,
            extractor_id=self.job.spec.extractor_id,
            adopt_failed=not self.retry_failed,
        )
        for name, reason in found.refused:
            log.warning("shard %s is not used, its tracks are worked on again: %s", name, reason)
        if found.rows.num_rows:
            self.writer.publish(found.rows)
            log.warning("adopted %d tracks from shards of an earlier run", found.rows.num_rows)
        return found.rows.num_rows

    def _work(self, todo: pa.Table, summary: ExtractSummary) -> None:
        assert self.writer is not None
        work_began_s = time.monotonic()
        total = self.wanted.num_rows
        progress = Progress(total, total - todo.num_rows, interval_s=self.recipe.progress_every_s)
        context = StageContext(
            self.recipe,
            self.root,
            self.job.spec.extractor_id,
            self.job.spec.weights_digest,
            self.writer.epoch,
        )

        def on_receipt(rows: pa.Table | None) -> None:
            """Called with each receipt, and about once a second with None."""
            if rows is not None:
                self.pending.append(rows)
                if self.retry_failed:
                    self.retried.update(rows["track_id"].to_pylist())
                failed = pc.sum(pc.equal(rows["status"], "failed")).as_py() or 0
                audio_s = pc.sum(rows["duration_s"]).as_py() or 0.0
                summary.work_tracks += rows.num_rows
                summary.work_audio_s += audio_s
                progress.add(rows.num_rows, failed, audio_s)
            progress.tick()
            if self.pending and time.monotonic() - self.published_s >= self.recipe.publish_every_s:
                self._publish()

        try:
            runner = PassRunner(context, self.storage, on_receipt)
            runner.run_until_done(self._remaining)
        except (FencedError, TransientError):
            raise  # the index is not ours any more, or out of reach; the next run adopts what is not in it
        except BaseException:
            self._publish()
            raise
        finally:
            summary.work_s = time.monotonic() - work_began_s
            progress.close()

    def _remaining(self) -> pa.Table:
        """What is left after everything that was written, indexed or not, has been taken in."""
        self._publish()
        todo = self._todo()
        if todo.num_rows and self._adopt(todo):
            todo = self._todo()
        return todo

    def _publish(self) -> None:
        assert self.writer is not None
        if self.pending:
            rows, self.pending = pa.concat_tables(self.pending), []
            self.writer.publish(rows)
        self.published_s = time.monotonic()

    def _reconcile(self, summary: ExtractSummary) -> None:
        """Tracks in = ok + failed, each once, in the index as it lies in the store."""
        index = read_latest(self.storage, self.root)
        if self.writer is not None and index is not None and index.number != self.writer.index.number:
            raise FencedError(
                "another driver has claimed this store while this one ended; run status to see it"
            )
        manifest = self.job.manifest.table.select(["track_id", "audio_uri", "etag"])
        missing = self.wanted.filter(pa.array(~split_work(self.wanted, index)))
        if index is None or missing.num_rows:
            first = missing["track_id"][0].as_py() if missing.num_rows else ""
            raise ReconciliationError(
                f"{missing.num_rows} of {len(manifest)} tracks have no row, the first is '{first}'; run the same "
                "command again"
            )
        positions = pc.drop_null(index.positions(manifest["track_id"]))
        rows = index.table.take(positions)
        if pc.count_distinct(index.table["track_id"]).as_py() != len(index):
            raise ReconciliationError(f"index {index.number} names a track twice")
        summary.ok = pc.sum(pc.equal(rows["status"], "ok")).as_py() or 0
        summary.failed = rows.num_rows - summary.ok
        summary.states = pc.sum(rows["num_states"]).as_py() or 0
        summary.audio_s = pc.sum(rows["duration_s"]).as_py() or 0.0
        summary.languages = value_counts(rows["language"])
        summary.failures = value_counts(rows["error_type"])
        if summary.failed > self.recipe.max_failure_rate * summary.tracks:
            raise TooManyFailuresError(
                f"{summary.failed} of {summary.tracks} tracks failed "
                f"({counts_in_words(summary.failures)}), more than max_failure_rate = "
                f"{self.recipe.max_failure_rate:g}; all rows are in {self.root}; see `wealy status "
                f"{self.recipe.store}`, then `wealy retry-failed`"
            )

    def _record(self) -> RunRecord:
        return RunRecord(
            self.hasty,
            join(self.root, "runs", self.run_id, "run.json"),
            job="retry-failed" if self.retry_failed else "extract",
            run_id=self.run_id,
            recipe=self.recipe.model_dump(mode="json"),
            extractor_id=self.job.spec.extractor_id,
            manifest_digest=self.job.manifest.digest,
            tracks=len(self.job.manifest),
            done_before=self.done_before,
        )

    def _end(
        self, record: RunRecord | None, summary: ExtractSummary, error: BaseException | None, began_s: float
    ) -> None:
        summary.wall_s = time.monotonic() - began_s
        if record is None:
            return
        outcome: dict[str, Any] = {"outcome": "done", "exit_code": 0}
        if isinstance(error, WealyError):
            outcome = {"outcome": type(error).__name__, "exit_code": error.exit_code, "error": str(error)}
        elif error is not None:
            outcome = {
                "outcome": type(error).__name__,
                "exit_code": 130 if isinstance(error, KeyboardInterrupt) else 1,
            }
        numbers = {k: v for k, v in vars(summary).items() if k != "root"}
        try:
            record.write(ended_at=now(), **outcome, **numbers)
        except WealyError as e:
            log.warning("the run record could not be written: %s", e)


def _failed_of(table: pa.Table, index: Index | None) -> pa.Table:
    """Rows whose track failed."""
    if index is None:
        return table.slice(0, 0)
    failed = index.table.filter(pc.equal(index.table["status"], "failed"))["track_id"]
    return table.filter(pc.is_in(table["track_id"], value_set=failed.combine_chunks()))
