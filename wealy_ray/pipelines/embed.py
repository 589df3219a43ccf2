"""`wealy embed`: vectors of every track of a store by a trained model, exactly once, whatever dies on the way.

The parts are those of extraction: claim and index, receipts, adoption, lease. What is not needed is the search for a
track that kills its worker: states are numbers, and their shapes are known.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import override

from wealy_ray.errors import (
    ReconciliationError,
    StoreError,
    TooManyFailuresError,
    TransientError,
)
from wealy_ray.model import TrainedModel, load_model, save_model
from wealy_ray.model.recipe import EmbedRecipe
from wealy_ray.pipelines.driver import Driver, OnReceipt, Remaining
from wealy_ray.pipelines.embed_stage import EmbedContext, build_dataset, groups_of
from wealy_ray.pipelines.ledger import EmbedLedger, facts_of
from wealy_ray.pipelines.passes import FRUITLESS_PASSES
from wealy_ray.pipelines.receipts import first_line, run_to_end
from wealy_ray.pipelines.session import Cluster, check_room, connect, gpus_each
from wealy_ray.report.embed_summary import EmbedSummary
from wealy_ray.report.run_record import RunRecord, new_run_id
from wealy_ray.report.status import value_counts
from wealy_ray.storage import Storage, join
from wealy_ray.store import (
    EmbedderSpec,
    Index,
    Lease,
    Release,
    StoreReader,
    kept_model,
    list_extractors,
    publish_release,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that was checked before anything is written.

    Attributes:
        recipe: The recipe.
        reader: The states.
        spec: What the recipe computes of them.
        model: What it computes that with.
    """

    recipe: EmbedRecipe
    reader: StoreReader
    spec: EmbedderSpec
    model: TrainedModel

    @property
    def root(self) -> str:
        """`<store>/<extractor-id>/embeddings/<embedder-id>`."""
        return self.spec.root(self.reader.root)

    def ledger(self) -> EmbedLedger:
        """The embeddings as they are now."""
        return EmbedLedger(self.reader, self.spec)


def prepare(recipe: EmbedRecipe) -> Prepared:
    """Checks everything that can be checked before anything is written.

    Raises:
        StoreError: No model, no states, or states that the model does not know.
        StorageError, TransientError: The storage refuses, or does not answer.
    """
    storage = Storage(recipe.storage)
    model = load_model(recipe.model, storage)
    config = model.config
    extractor_id = recipe.extractor_id
    if extractor_id is None and config.extractor_id in list_extractors(storage, recipe.store):
        extractor_id = config.extractor_id
    reader = StoreReader.open(storage, recipe.store, extractor_id, recipe.index)
    model.check_extractor(reader.extractor_id)
    if not len(reader.index):
        raise StoreError(f"the store {reader.root} has no track yet: `wealy extract` comes first")
    storage.check_folder(recipe.store)
    windows = recipe.windows.resolved(config.crop)
    return Prepared(
        recipe,
        reader,
        EmbedderSpec(config.digest, reader.extractor_id, config.kinds, windows.model_dump()),
        model,
    )


def run_embed(recipe: EmbedRecipe) -> EmbedSummary:
    """Runs embedding until every track of the states' index has its row.

    Raises:
        WealyError: See `wealy_ray.errors`; all finished work is in the store.
    """
    began_s = time.monotonic()
    job = prepare(recipe)
    cluster = _cluster_for(recipe) if job.ledger().todo().num_rows else None
    # nothing was written up to here
    storage = job.reader.storage
    job.spec.ensure(storage, job.reader.root, storage.canonical(recipe.model))
    _keep_model(job)
    run_id = new_run_id()
    lease = Lease(storage, job.root, run_id, recipe.lease_s)
    lease.acquire(log.warning)
    try:
        run = _Run(job, run_id, job.ledger())
        run.execute(cluster, began_s)
        return run.summary
    finally:
        lease.release()


def _keep_model(job: Prepared) -> None:
    """The model goes with its vectors, see `kept_model`."""
    storage, uri = job.reader.storage, kept_model(job.root)
    if not storage.exists(join(uri, "config.json")):
        card = join(job.recipe.model, "README.md")  # for people only: a model is one without it
        text = storage.read(card).decode(errors="replace") if storage.exists(card) else ""
        save_model(storage, uri, job.model.network, job.model.config, text)


def _cluster_for(recipe: EmbedRecipe) -> Cluster:
    cluster, resources = connect(), recipe.resources
    check_room(
        cluster,
        gpus_each(resources.gpus, cluster),
        resources.cpus,
        workers="workers",
        fewer_gpus="set resources.gpus: 0 to run on CPUs",
        fewer_cpus="lower resources.cpus",
    )
    return cluster


class _Run(Driver):
    """One driver at work on one embedding."""

    def __init__(self, job: Prepared, run_id: str, ledger: EmbedLedger) -> None:
        self.job, self.ledger, self.recipe = job, ledger, job.recipe
        self.summary = EmbedSummary(job.root, ledger.wanted.num_rows, done_before=ledger.done_before)
        super().__init__(run_id, ledger, self.summary, job.recipe)

    @override
    def connect(self) -> Cluster:
        return _cluster_for(self.recipe)

    @override
    def note(self, rows: pa.Table) -> tuple[pa.Table, float]:
        self.summary.work_vectors += pc.sum(rows["num_windows"]).as_py() or 0
        return rows, 0.0

    @override
    def run_until_done(self, cluster: Cluster, remaining: Remaining, on_receipt: OnReceipt) -> None:
        """A pass ends early when a worker died too often."""
        job, ledger, gpus = self.job, self.ledger, gpus_each(self.recipe.resources.gpus, cluster)
        facts = facts_of(job.spec, job.reader.index) | {"epoch": str(ledger.writer.epoch)}
        context = EmbedContext(self.recipe, job.spec, job.reader.index.number, facts)
        fruitless, left_before = 0, -1
        while (todo := remaining()).num_rows:
            groups = groups_of(ledger.wanted, todo, self.recipe.resources.tracks_per_shard)
            lost = run_to_end(build_dataset(groups, context, gpus), on_receipt)
            if lost is None and todo.num_rows == left_before:
                raise ReconciliationError(
                    f"{todo.num_rows} tracks came out of the pipeline without a row, the first is "
                    f"'{todo['track_id'][0].as_py()}'; run the same command again"
                )
            if lost is not None:
                log.warning("a worker or node was lost (%s); starting another pass", first_line(lost))
            fruitless = fruitless + 1 if todo.num_rows == left_before else 0
            left_before = todo.num_rows
            if fruitless >= FRUITLESS_PASSES:
                raise TransientError(
                    f"workers died in {fruitless + 1} passes in a row and no track was finished ({first_line(lost)}); "
                    "lower resources.states_per_pass if memory runs out, then run the same command again"
                )

    @override
    def reconcile(self) -> None:
        summary, ledger = self.summary, self.ledger
        index = ledger.reconciled()
        rows = index.table.take(pc.drop_null(index.positions(ledger.wanted["track_id"])))
        summary.ok = pc.sum(pc.equal(rows["status"], "ok")).as_py() or 0
        summary.failed = rows.num_rows - summary.ok
        summary.vectors = pc.sum(rows["num_windows"]).as_py() or 0
        summary.dim = pc.max(rows["dim"]).as_py() or 0
        summary.failures = value_counts(rows["error_type"])
        if summary.ok + summary.failed != summary.tracks:
            raise ReconciliationError(
                f"{summary.tracks} tracks went in, {summary.ok} ok and {summary.failed} failed came out"
            )
        invalid = summary.failures.get("invalid_embedding", 0)
        if invalid:
            raise TooManyFailuresError(
                f"the vectors of {invalid} of {summary.tracks} tracks are NaN or infinite, though their states are "
                f"not: the model {self.recipe.model} is broken; all rows are in {summary.root}"
            )
        if self.recipe.release:
            self._release(index)

    def _release(self, vectors: Index) -> None:
        """Lets readers know of these vectors, now that each track has its row."""
        states, spec = self.job.reader, self.job.spec
        release = Release(
            states.index.metadata["manifest_digest"],
            states.extractor_id,
            states.index.number,
            spec.model_digest,
            spec.embedder_id,
            vectors.number,
        )
        self.summary.release = publish_release(states.storage, self.recipe.store, release, self.run_id)

    @override
    def record(self, cluster: Cluster) -> RunRecord:
        job = self.job
        return RunRecord(
            job.reader.storage,
            join(job.root, "runs", self.run_id, "run.json"),
            job="embed",
            run_id=self.run_id,
            cluster=vars(cluster),
            recipe=self.recipe.model_dump(mode="json"),
            extractor_id=job.reader.extractor_id,
            embedder_id=job.spec.embedder_id,
            index=job.reader.index.number,
            tracks=self.summary.tracks,
            done_before=self.ledger.done_before,
        )
