"""What is wanted, what is done, and what a driver has taken in but not yet published."""

from __future__ import annotations

import logging
import time

import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.catalog import Manifest
from wealy_ray.pipelines.stages import WORK_SCHEMA
from wealy_ray.storage import Storage
from wealy_ray.store import ExtractorSpec, Index, IndexWriter, adopt, read_latest, split_work

log = logging.getLogger(__name__)


class Ledger:
    """One driver's view of one store; reads only, until it has claimed the index.

    Args:
        storage: Where the store lies.
        root: `<store>/<extractor-id>`.
        manifest: The tracks of the job.
        spec: The extractor.
        retry_failed: Only tracks that failed before are wanted, and an old failure is not done.

    Attributes:
        wanted: Rows in `WORK_SCHEMA`: tracks that this run is responsible for.
        done_before: Of them, finished before this run.
        adopted: Tracks taken over from shards that no index named.
    """

    def __init__(
        self, storage: Storage, root: str, manifest: Manifest, spec: ExtractorSpec, *, retry_failed: bool
    ) -> None:
        self.storage, self.root, self.manifest, self.spec = storage, root, manifest, spec
        self.retry_failed = retry_failed
        self.index: Index | None = read_latest(storage, root)
        tracks = manifest.table.select(WORK_SCHEMA.names).cast(WORK_SCHEMA)
        self.wanted = _failed_of(tracks, self.index) if retry_failed else tracks
        self.adopted = 0
        self._writer: IndexWriter | None = None
        self._retried: set[str] = set()
        self._pending: list[pa.Table] = []
        self._published_s = time.monotonic()
        self.done_before = self.wanted.num_rows - self.todo().num_rows

    @property
    def writer(self) -> IndexWriter:
        """The claim on the index."""
        assert self._writer is not None, "the index is not claimed"
        return self._writer

    @property
    def has_claim(self) -> bool:
        """Whether `claim` was called."""
        return self._writer is not None

    def todo(self) -> pa.Table:
        """Rows in `WORK_SCHEMA` that are not done."""
        done = split_work(self.wanted, self.index, retry_failed=self.retry_failed)
        todo = self.wanted.filter(pa.array(~done))
        if self._retried:  # a track that failed again is done for this run
            again = pc.is_in(todo["track_id"], value_set=pa.array(sorted(self._retried)))
            todo = todo.filter(pc.invert(again))
        return todo

    def claim(self, run_id: str) -> None:
        """Takes the right to publish.

        Raises:
            FencedError: Somebody else took it at the same moment.
        """
        self._writer = IndexWriter.claim(
            self.storage, self.root, manifest_digest=self.manifest.digest, run_id=run_id
        )
        self.index = self._writer.index

    def receive(self, rows: pa.Table) -> None:
        """Takes in a receipt: index rows of a shard that was written."""
        self._pending.append(rows)
        if self.retry_failed:
            self._retried.update(rows["track_id"].to_pylist())

    def publish(self, at_least_every_s: float = 0.0) -> None:
        """Publishes what was taken in, unless that was done less than `at_least_every_s` ago.

        Raises:
            FencedError: Another driver has claimed the store.
        """
        if not self._pending or time.monotonic() - self._published_s < at_least_every_s:
            return
        rows, self._pending = pa.concat_tables(self._pending), []
        self.index = self.writer.publish(rows)
        self._published_s = time.monotonic()

    def remaining(self) -> pa.Table:
        """What is left (`WORK_SCHEMA`) after everything that was written, indexed or not, was taken in."""
        self.publish()
        todo = self.todo()
        if not todo.num_rows:
            return todo
        found = adopt(
            self.storage,
            self.root,
            self.index,
            todo,
            extractor_id=self.spec.extractor_id,
            adopt_failed=not self.retry_failed,
        )
        for name, reason in found.refused:
            log.warning("shard %s is not used, its tracks are worked on again: %s", name, reason)
        if not found.rows.num_rows:
            return todo
        self.index = self.writer.publish(found.rows)
        self.adopted += found.rows.num_rows
        log.warning("adopted %d tracks from shards that no index named", found.rows.num_rows)
        return self.todo()


def _failed_of(tracks: pa.Table, index: Index | None) -> pa.Table:
    """Rows whose track failed."""
    if index is None:
        return tracks.slice(0, 0)
    failed = index.table.filter(pc.equal(index.table["status"], "failed"))["track_id"]
    return tracks.filter(pc.is_in(tracks["track_id"], value_set=failed.combine_chunks()))
