"""Extraction: manifest -> store. The driver: prepares, runs passes over Ray Data, publishes, reconciles.

    prepare   read the manifest, load the weights, name the extractor, find what is done      (writes nothing)
    claim     lease, index claim, adoption of finished shards that no index names
    passes    Ray Data over what is left; receipts -> index; suspects of a dead engine run alone
    reconcile tracks in = ok + failed, each once

Everything that must survive the driver lies in the store; running the same recipe again goes on from there.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import override

from wealy_ray.catalog import Manifest, read_manifest
from wealy_ray.config import ExtractRecipe
from wealy_ray.errors import StorageError, StoreError, TooManyFailuresError
from wealy_ray.pipelines.driver import Driver, OnReceipt, Remaining
from wealy_ray.pipelines.engine_stage import decode_options
from wealy_ray.pipelines.ledger import ExtractLedger
from wealy_ray.pipelines.passes import PassRunner
from wealy_ray.pipelines.session import Cluster, check_resources, connect
from wealy_ray.pipelines.stages import ENGINE_COLUMN, StageContext
from wealy_ray.report.extract_summary import ExtractSummary, sum_engines
from wealy_ray.report.run_record import RunRecord, new_run_id
from wealy_ray.report.status import value_counts
from wealy_ray.report.tables import counts_in_words
from wealy_ray.storage import ObjectForbiddenError, Storage, join, scheme_of
from wealy_ray.storage.uri import S3_SCHEMES
from wealy_ray.store import ExtractorSpec, Lease

if TYPE_CHECKING:
    from wealy_ray.whisper import LoadedModel

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

    def ledger(self, retry_failed: bool) -> ExtractLedger:
        """The store as it is now."""
        return ExtractLedger(self.storage, self.root, self.manifest, self.spec, retry_failed=retry_failed)


def prepare(recipe: ExtractRecipe) -> Prepared:
    """Checks everything that can be checked before anything is written.

    Raises:
        ConfigError, ManifestError, StorageError, ModelError, TransientError: With one sentence each.
    """
    from wealy_ray.whisper import load_whisper
    from wealy_ray.whisper.vocabulary import Vocabulary

    storage = Storage(recipe.storage)
    manifest = read_manifest(storage, recipe.manifest)
    storage.check_folder(recipe.store)
    _check_audio_places(storage, manifest)
    loaded = load_whisper(recipe.model, read_bytes=storage.read)
    vocabulary = Vocabulary.of(loaded.model)
    if recipe.decode.language is not None:
        vocabulary.check_language(recipe.decode.language)
    if recipe.decode.initial_prompt is not None:
        vocabulary.prompt_tokens(recipe.decode.initial_prompt)
    decode_options(recipe).state_block(loaded.model.dims.n_text_layer)
    return Prepared(recipe, storage, manifest, extractor_of(recipe, loaded))


def extractor_of(recipe: ExtractRecipe, loaded: LoadedModel) -> ExtractorSpec:
    """What a recipe computes with these weights."""
    return ExtractorSpec(
        weights_digest=loaded.digest,
        max_duration_s=recipe.audio.max_duration_s,
        windows=recipe.windows.model_dump(),
        decode=_decode_identity(recipe),
        state_layer=recipe.decode.state_layer,
    )


def _decode_identity(recipe: ExtractRecipe) -> dict[str, Any]:
    """Decode settings as they name the extractor: what is not used is not named, so that new options keep old ids."""
    decode = recipe.decode.model_dump(exclude={"state_layer"})
    unused = {name for name in ("initial_prompt", "max_repeats") if decode[name] is None}
    return {name: value for name, value in decode.items() if name not in unused} | {
        "timestamps": recipe.timestamps
    }


def _check_audio_places(storage: Storage, manifest: Manifest) -> None:
    """A missing bucket, bad credentials or a disk that is not mounted stop the run.

    A bucket that may only be read, not listed, is fine.
    """
    uris = manifest.table["audio_uri"].to_pylist()
    folders = {os.path.dirname(storage.canonical(uri)) for uri in uris if scheme_of(uri) == "file"}
    if folders and not any(map(os.path.isdir, folders)):
        raise StorageError(
            f"none of the audio's folders exists, for example {min(folders)}; is the disk mounted?"
        )
    for bucket in sorted({"/".join(uri.split("/", 3)[:3]) for uri in uris if scheme_of(uri) in S3_SCHEMES}):
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
    ledger = job.ledger(retry_failed)
    if retry_failed and ledger.index is None:
        raise StoreError(
            f"nothing was extracted to {recipe.store} with these settings; `wealy status` shows what was"
        )
    cluster = _cluster_for(recipe) if ledger.todo().num_rows else None
    # nothing was written up to here
    job.spec.ensure(job.storage, recipe.store)
    run_id = new_run_id()
    lease = Lease(job.storage, job.root, run_id, recipe.lease_s)
    lease.acquire(log.warning)
    try:
        run = _Run(job, run_id, job.ledger(retry_failed))
        run.execute(cluster, began_s)
        return run.summary
    finally:
        lease.release()


def _cluster_for(recipe: ExtractRecipe) -> Cluster:
    cluster = connect()
    check_resources(recipe.resources, cluster)
    return cluster


class _Run(Driver):
    """One driver at work on one store."""

    def __init__(self, job: Prepared, run_id: str, ledger: ExtractLedger) -> None:
        self.job, self.ledger, self.recipe, self.root = job, ledger, job.recipe, job.root
        self.engines: dict[str, dict[str, float]] = {}
        self.summary = ExtractSummary(job.root, len(job.manifest), done_before=ledger.done_before)
        super().__init__(run_id, ledger, self.summary, job.recipe)

    @override
    def connect(self) -> Cluster:
        return _cluster_for(self.recipe)

    @override
    def run_until_done(self, cluster: Cluster, remaining: Remaining, on_receipt: OnReceipt) -> None:
        spec = self.job.spec
        context = StageContext(
            self.recipe, self.root, spec.extractor_id, spec.weights_digest, self.ledger.writer.epoch
        )
        PassRunner(context, self.job.storage, cluster, on_receipt).run_until_done(remaining)

    @override
    def note(self, rows: pa.Table) -> tuple[pa.Table, float]:
        audio_s = pc.sum(rows["duration_s"]).as_py() or 0.0
        self.summary.work_audio_s += audio_s
        return self._note_engines(rows), audio_s

    def _note_engines(self, rows: pa.Table) -> pa.Table:
        """Keeps each engine's latest counters; returns the receipt without them."""
        if ENGINE_COLUMN not in rows.column_names:
            return rows
        for text in set(rows[ENGINE_COLUMN].to_pylist()):
            counters = json.loads(text)
            engine = counters.pop("engine")
            if counters["steps"] >= self.engines.get(engine, counters)["steps"]:
                self.engines[engine] = counters
        self.summary.engine = sum_engines(self.engines.values())
        return rows.drop_columns([ENGINE_COLUMN])

    @override
    def reconcile(self) -> None:
        summary, index = self.summary, self.ledger.reconciled()
        rows = index.table.take(pc.drop_null(index.positions(self.job.manifest.table["track_id"])))
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

    @override
    def record(self, cluster: Cluster) -> RunRecord:
        return RunRecord(
            self.job.storage,
            join(self.root, "runs", self.run_id, "run.json"),
            job="retry-failed" if self.ledger.retry_failed else "extract",
            run_id=self.run_id,
            cluster=vars(cluster),
            recipe=self.recipe.model_dump(mode="json"),
            extractor_id=self.job.spec.extractor_id,
            manifest_digest=self.job.manifest.digest,
            tracks=len(self.job.manifest),
            done_before=self.ledger.done_before,
        )
