"""What is wanted, what is done, and what a driver has taken in but not yet published."""

from __future__ import annotations

import abc
import logging
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import override

from wealy_ray.catalog import Manifest
from wealy_ray.errors import FencedError, ReconciliationError
from wealy_ray.pipelines.stages import WORK_SCHEMA
from wealy_ray.storage import Storage
from wealy_ray.store import (
    EMBEDDING_INDEX_SCHEMA,
    Adoption,
    EmbedderSpec,
    ExtractorSpec,
    Index,
    IndexWriter,
    StoreReader,
    adopt,
    adopt_embeddings,
    is_embedded,
    lie_in,
    lost_shards,
    read_latest,
    split_work,
)

log = logging.getLogger(__name__)


class Ledger(abc.ABC):
    """One driver's view of one folder of shards and indexes; reads only, until it has claimed the index.

    Args:
        storage: Where the folder lies.
        root: The folder.

    Attributes:
        index: The latest that is known.
        lost: Shards that it named at the beginning and that are not there: their tracks are not done.
        wanted: Tracks that this run is responsible for.
        done_before: Of them, finished before this run.
        adopted: Tracks taken over from shards that no index named.
    """

    wanted: pa.Table
    done_before: int

    def __init__(self, storage: Storage, root: str) -> None:
        self.storage, self.root = storage, root
        self.index: Index | None = read_latest(storage, root)
        self.lost = lost_shards(storage, root, self.index)
        self.adopted = 0
        self._writer: IndexWriter | None = None
        self._pending: list[pa.Table] = []
        self._published_s = time.monotonic()

    @abc.abstractmethod
    def _rows_in(self, index: Index | None) -> np.ndarray:
        """Which rows of `wanted` an index holds, wherever it says that they are, bool."""

    @abc.abstractmethod
    def _claim(self, run_id: str) -> IndexWriter: ...

    @abc.abstractmethod
    def _find_written(self, todo: pa.Table) -> Adoption: ...

    @property
    def writer(self) -> IndexWriter:
        """The claim on the index."""
        assert self._writer is not None, "the index is not claimed"
        return self._writer

    @property
    def has_claim(self) -> bool:
        """Whether `claim` was called."""
        return self._writer is not None

    def done(self, index: Index | None) -> np.ndarray:
        """Which rows of `wanted` an index holds, bool."""
        return self._rows_in(index) & ~lie_in(self.lost, self.wanted["track_id"], index)

    def num_lost(self) -> int:
        """Rows of `wanted` that the index holds in a shard that is not there."""
        return int(lie_in(self.lost, self.wanted["track_id"], self.index).sum())

    def todo(self) -> pa.Table:
        """Rows of `wanted` that are not done."""
        return self.wanted.filter(pa.array(~self.done(self.index)))

    def claim(self, run_id: str) -> None:
        """Takes the right to publish.

        Raises:
            FencedError: Somebody else took it at the same moment.
        """
        self._writer = self._claim(run_id)
        self.index = self._writer.index

    def receive(self, rows: pa.Table) -> None:
        """Takes in a receipt: index rows of a shard that was written."""
        self._pending.append(rows)

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

    def reconciled(self) -> Index:
        """The index as it lies in the store, which holds each wanted track once.

        Raises:
            FencedError: Another driver has claimed the store.
            ReconciliationError: Tracks have no row, or two.
        """
        index = read_latest(self.storage, self.root)
        if self.has_claim and index is not None and index.number != self.writer.index.number:
            raise FencedError(
                "another driver has claimed this store while this one ended; see `wealy status`"
            )
        missing = self.wanted.filter(pa.array(~self.done(index)))
        if index is None or missing.num_rows:
            first = missing["track_id"][0].as_py() if missing.num_rows else ""
            raise ReconciliationError(
                f"{missing.num_rows} of {self.wanted.num_rows} tracks have no row, the first is '{first}'; run the "
                "same command again"
            )
        if pc.count_distinct(index.table["track_id"]).as_py() != len(index):
            raise ReconciliationError(f"index {index.number} of {self.root} names a track twice")
        return index

    def remaining(self) -> pa.Table:
        """Rows of `wanted` that are left after everything that was written, indexed or not, was taken in."""
        self.publish()
        todo = self.todo()
        if not todo.num_rows:
            return todo
        found = self._find_written(todo)
        for name, reason in found.refused:
            log.warning("shard %s is not used, its tracks are worked on again: %s", name, reason)
        if not found.rows.num_rows:
            return todo
        self.index = self.writer.publish(found.rows)
        self.adopted += found.rows.num_rows
        log.warning("adopted %d tracks from shards that no index named", found.rows.num_rows)
        return self.todo()


class ExtractLedger(Ledger):
    """Of an extraction: `wanted` holds tracks of the manifest, in `WORK_SCHEMA`.

    Args:
        storage: Where the store lies.
        root: `<store>/<extractor-id>`.
        manifest: The tracks of the job.
        spec: The extractor.
        retry_failed: Only tracks that failed before are wanted, and an old failure is not done.
    """

    def __init__(
        self, storage: Storage, root: str, manifest: Manifest, spec: ExtractorSpec, *, retry_failed: bool
    ) -> None:
        super().__init__(storage, root)
        self.manifest, self.spec, self.retry_failed = manifest, spec, retry_failed
        tracks = manifest.table.select(WORK_SCHEMA.names).cast(WORK_SCHEMA)
        self.wanted = _failed_of(tracks, self.index) if retry_failed else tracks
        self._retried: set[str] = set()
        self.done_before = self.wanted.num_rows - self.todo().num_rows

    @override
    def _rows_in(self, index: Index | None) -> np.ndarray:
        return split_work(self.wanted, index)

    @override
    def todo(self) -> pa.Table:
        if not self.retry_failed:
            return super().todo()
        # a track that failed again is done for this run
        done = split_work(self.wanted, self.index, retry_failed=True)
        again = pc.is_in(self.wanted["track_id"], value_set=pa.array(sorted(self._retried), pa.string()))
        return self.wanted.filter(pa.array(~(done | np.asarray(again, bool))))

    @override
    def receive(self, rows: pa.Table) -> None:
        super().receive(rows)
        if self.retry_failed:
            self._retried.update(rows["track_id"].to_pylist())

    @override
    def _claim(self, run_id: str) -> IndexWriter:
        return IndexWriter.claim(self.storage, self.root, manifest_digest=self.manifest.digest, run_id=run_id)

    @override
    def _find_written(self, todo: pa.Table) -> Adoption:
        return adopt(
            self.storage,
            self.root,
            self.index,
            todo,
            extractor_id=self.spec.extractor_id,
            adopt_failed=not self.retry_failed,
        )


class EmbedLedger(Ledger):
    """Of an embedding: `wanted` holds all index rows of the states; a track is done for the states it was read from.

    Args:
        reader: The states.
        spec: The embedder.
    """

    def __init__(self, reader: StoreReader, spec: EmbedderSpec) -> None:
        super().__init__(reader.storage, spec.root(reader.root))
        self.states, self.spec = reader.index, spec
        self.wanted = reader.index.table
        self.done_before = self.wanted.num_rows - self.todo().num_rows

    @override
    def _rows_in(self, index: Index | None) -> np.ndarray:
        return is_embedded(self.wanted, index)

    @override
    def _claim(self, run_id: str) -> IndexWriter:
        return IndexWriter.claim(
            self.storage,
            self.root,
            manifest_digest=self.states.metadata["manifest_digest"],
            run_id=run_id,
            schema=EMBEDDING_INDEX_SCHEMA,
            facts=facts_of(self.spec, self.states),
        )

    @override
    def _find_written(self, todo: pa.Table) -> Adoption:
        return adopt_embeddings(self.storage, self.root, self.index, todo)


def facts_of(spec: EmbedderSpec, states: Index) -> dict[str, str]:
    """What stands in the metadata of every file of an embedding."""
    return {
        "model_digest": spec.model_digest,
        "extractor_id": spec.extractor_id,
        "states_index": str(states.number),
    }


def _failed_of(tracks: pa.Table, index: Index | None) -> pa.Table:
    """Rows whose track failed."""
    if index is None:
        return tracks.slice(0, 0)
    failed = index.table.filter(pc.equal(index.table["status"], "failed"))["track_id"]
    return tracks.filter(pc.is_in(tracks["track_id"], value_set=failed.combine_chunks()))
