"""`wealy evaluate`: exact metrics of several systems over one collection, shared among Ray workers.

Queries are cut into tiles, tiles into shards of work (`ranking`). What is computed for a shard depends on nothing but
its queries: any number of workers gives the same bits.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from wealy_ray.catalog import Manifest, read_manifest, tracks_of_split
from wealy_ray.errors import ReconciliationError, StoreError
from wealy_ray.pipelines.ranking import Ranking, RankKeys, as_parquet, file_name
from wealy_ray.pipelines.session import Cluster, check_room, connect
from wealy_ray.pipelines.sharing import share
from wealy_ray.progress import Progress
from wealy_ray.report.evaluation_facts import counts_of, extraction_of, similarity_sample
from wealy_ray.report.run_record import RunRecord, now
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.embedded import StoreVectors
from wealy_ray.retrieval.facts import facts_of_embeddings
from wealy_ray.retrieval.material import Material, collection_of, shard_material, tracks_by_shard
from wealy_ray.retrieval.metrics import grouped, views_of
from wealy_ray.retrieval.recipe import (
    AverageEmbedding,
    Embeddings,
    EvaluateRecipe,
    Fusion,
    SystemSettings,
    name_of,
)
from wealy_ray.retrieval.scores import Scores
from wealy_ray.retrieval.systems import build_scores, fuse, standing_rows
from wealy_ray.storage import Storage, join
from wealy_ray.store import StoreReader, count_stale

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        out: Its folder.
        metrics: What `metrics.json` holds.
    """

    out: str
    metrics: dict[str, Any]


def run_evaluate(recipe: EvaluateRecipe) -> Evaluated:
    """Runs an evaluation, or goes on with one that was stopped.

    Raises:
        WealyError: See `wealy_ray.errors`.
    """
    began_s = time.monotonic()
    storage = Storage(recipe.storage)
    manifest = read_manifest(storage, recipe.manifest)
    for split in sorted(_splits(recipe)):
        tracks_of_split(manifest.table, recipe.manifest, split)
    storage.check_folder(recipe.out)
    reader = None
    if recipe.store is not None:
        reader = StoreReader.open(storage, recipe.store, recipe.extractor_id, recipe.index)
        for name, outdated in _count_outdated(recipe, reader, reader.index.table).items():
            if outdated:
                log.warning(
                    "%s: %d tracks have no vectors of their states as they are now; `wealy embed` makes them",
                    name,
                    outdated,
                )
    run = _Run(recipe, storage, manifest, reader, _cluster_for(recipe))
    record = RunRecord(
        storage,
        join(recipe.out, "run.json"),
        job="evaluate",
        recipe=recipe.model_dump(mode="json"),
        manifest_digest=manifest.digest,
        extractor_id=reader.extractor_id if reader else None,
        index=reader.index.number if reader else None,
        cluster=vars(run.cluster),
    )
    record.write()
    try:
        found = run.execute()
    except BaseException as e:
        code = getattr(e, "exit_code", 130 if isinstance(e, KeyboardInterrupt) else 1)
        record.write(ended_at=now(), outcome=type(e).__name__, exit_code=code, error=str(e)[:2000])
        raise
    record.write(
        ended_at=now(), outcome="done", exit_code=0, wall_s=time.monotonic() - began_s, ranked=run.ranked
    )
    return found


def _cluster_for(recipe: EvaluateRecipe) -> Cluster:
    cluster = connect()
    check_room(
        cluster,
        recipe.resources.gpus,
        recipe.resources.threads,
        workers="workers",
        fewer_gpus="set resources.gpus: 0 to rank on CPUs",
        fewer_cpus="lower resources.threads",
    )
    return cluster


def _count_outdated(recipe: EvaluateRecipe, reader: StoreReader, wanted: pa.Table) -> dict[str, int]:
    """Tracks whose vectors in the store are not those of their states now, by system.

    Args:
        recipe: Names the systems.
        reader: The store.
        wanted: Rows of its index that count.

    Raises:
        StoreError: Vectors that the recipe asks for are not there.
    """
    vectors = {
        system.name: StoreVectors.open(reader.storage, reader.root, system.embedder_id)
        for system in recipe.systems
        if isinstance(system, Embeddings) and system.uri is None
    }
    return {name: count_stale(wanted, of.reader.index) for name, of in vectors.items()}


class _Run:
    """One driver at work on one evaluation."""

    def __init__(
        self,
        recipe: EvaluateRecipe,
        storage: Storage,
        manifest: Manifest,
        reader: StoreReader | None,
        cluster: Cluster,
    ) -> None:
        self.recipe, self.storage, self.manifest, self.reader = recipe, storage, manifest, reader
        self.cluster = cluster
        self.keys = RankKeys(recipe, storage, manifest.digest, reader)
        self.ranked: dict[str, int] = {}

    def execute(self) -> Evaluated:
        recipe = self.recipe
        material = self._material() if self.reader is not None else None
        collection = collection_of(recipe, self.manifest.table, material, recipe.split)
        # before vectors are read: should they become newer meanwhile, too many are counted, not too few
        outdated = self._outdated(collection)
        systems = standing_rows(collection, material, recipe.seed)
        kinds = {"random": "random", "same language": "language"}
        plain = [s for s in recipe.systems if not isinstance(s, Fusion)]
        for system in plain:
            log.info("preparing %s", name_of(system))
            systems[name_of(system)] = self._built(system, collection, material)
        curves: list[dict[str, Any]] = []
        fitted: list[dict[str, Any]] = []
        for fusion in (s for s in recipe.systems if isinstance(s, Fusion)):
            scores, chosen = fuse(fusion, collection, systems, self._tuning(fusion, collection, material))
            systems[fusion.name] = scores
            if chosen is not None:
                (fitted if "fitted" in chosen else curves).append(
                    {"name": fusion.name, "split": recipe.tuning_split, **chosen}
                )
        kinds |= {name_of(s): s.kind for s in recipe.systems}
        facts = {
            name_of(s): facts_of_embeddings(self.storage, s.uri or self._vectors(s).reader.root)
            for s in recipe.systems
            if isinstance(s, Embeddings)
        }
        # an earlier recipe's numbers would stand beside this one's queries, should this run be stopped
        self.storage.delete(join(recipe.out, "metrics.json"))
        entries = []
        for name, scores in systems.items():
            rows = self._ranked(name, scores, collection)
            path = f"per_query/{file_name(name)}.parquet"
            self._write(path, as_parquet(rows))
            missing = int(scores.missing.sum())
            entries.append(
                {
                    "name": name,
                    "kind": kinds[name],
                    "facts": facts.get(name),
                    "missing": missing,
                    "outdated": outdated.get(name, 0),
                    "per_query": path,
                    "views": views_of(rows),
                    "groups": grouped(rows),
                }
            )
        metrics = {
            "title": recipe.out.rstrip("/").rsplit("/", 1)[-1],
            "collection": counts_of(recipe, self.manifest.table, collection, material),
            "extraction": extraction_of(self.manifest.table, material, self.reader)
            if material is not None and self.reader is not None
            else None,
            "systems": entries,
            "fusion_curves": curves,
            "fitted_fusions": fitted,
            "tuned_on_test": recipe.tunes_on_test,
        }
        shown = next(name for name in systems if name not in ("random", "same language"))
        sample = similarity_sample(shown, systems[shown], collection)
        if sample is not None:
            self._write("sample.npz", sample)
        if material is not None:
            self._write("transcripts.parquet", as_parquet(material.table.select(["track_id", "text"])))
        # written last: who finds it finds everything it names
        self._write("metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
        return Evaluated(recipe.out, metrics)

    def _built(self, system: SystemSettings, collection: Collection, material: Material | None) -> Scores:
        return build_scores(
            system,
            collection,
            material,
            self.storage,
            scratch=join(self.recipe.out, "vectors"),
            held_bytes=int(self.recipe.resources.held_gib * 2**30),
            states_root=self.reader.root if self.reader else None,
        )

    def _material(self) -> Material:
        """Transcripts and means of the tracks that matter, read by workers."""
        assert self.reader is not None
        recipe, index = self.recipe, self.reader.index
        splits = dict(
            zip(
                self.manifest.table["track_id"].to_pylist(),
                self.manifest.table["split"].to_pylist(),
                strict=True,
            )
        )
        wanted = _splits(recipe)
        kept = [t for t, split in splits.items() if recipe.split is None or split in wanted]
        ids = pa.array(kept, pa.string())
        shards = tracks_by_shard(index.table, ids)
        if not shards:
            raise StoreError(
                f"the store {recipe.store} has no states of the manifest's tracks: extract them first"
            )
        expected = sorted(track_id for _, tracks in shards for track_id in tracks)
        progress = Progress(len(expected), interval_s=recipe.progress_every_s)
        tables = []
        for done in share(
            _read_shard,
            shards,
            self.reader,
            cluster=self.cluster,
            max_workers=recipe.resources.max_workers,
        ):
            progress.tick()
            if done is not None:
                tables.append(done[1])
                progress.add(done[1].num_rows, 0, pc.sum(done[1]["duration_s"]).as_py() or 0.0)
        progress.close()
        table = pa.concat_tables(tables).sort_by("track_id")
        if table["track_id"].to_pylist() != expected:
            raise ReconciliationError(f"{len(expected)} tracks were to be read, {table.num_rows} were")
        table = table.filter(pc.is_in(table["track_id"], value_set=ids))
        return Material(table, splits)

    def _tuning(
        self, fusion: Fusion, collection: Collection, material: Material | None
    ) -> tuple[Collection, Mapping[str, Scores]] | None:
        recipe = self.recipe
        if not recipe.tuned(fusion):
            return None
        on = collection_of(recipe, self.manifest.table, material, recipe.tuning_split)
        self._warn_of_shared_cliques(fusion.name, on, collection)
        scores: dict[str, Scores] = dict(standing_rows(on, material, recipe.seed))
        needed = {name_of(s): s for s in recipe.systems}
        for name in fusion.of:
            part = needed.get(name)
            if part is not None:
                assert not isinstance(part, Fusion), "the recipe was checked"
                scores[name] = self._built(part, on, material)
        return on, scores

    def _warn_of_shared_cliques(self, fusion: str, on: Collection, collection: Collection) -> None:
        shared = sorted(set(on.clique_names) & set(collection.clique_names))
        if shared and not self.recipe.tunes_on_test:
            log.warning(
                "fusion '%s' is tuned on versions of %d cliques that it is reported on, e.g. '%s': put each "
                "clique into one split",
                fusion,
                len(shared),
                shared[0],
            )

    def _ranked(self, name: str, scores: Scores, collection: Collection) -> pa.Table:
        folder = join(self.recipe.out, "ranks", file_name(name), self.keys.of(name))
        ranking = Ranking(name, scores, collection, folder, self.recipe.resources, self.storage)
        rows, self.ranked[name] = ranking.rows(self.cluster, self.recipe.progress_every_s)
        return rows

    def _outdated(self, collection: Collection) -> dict[str, int]:
        """Of the tracks that are compared."""
        if self.reader is None:
            return {}
        rows, ids = self.reader.index.table, pa.array(collection.track_ids.tolist(), pa.string())
        return _count_outdated(
            self.recipe, self.reader, rows.filter(pc.is_in(rows["track_id"], value_set=ids))
        )

    def _vectors(self, system: Embeddings) -> StoreVectors:
        """The store's own vectors."""
        assert self.reader is not None, "the recipe was checked"
        return StoreVectors.open(self.storage, self.reader.root, system.embedder_id)

    def _write(self, path: str, data: bytes) -> None:
        self.storage.write(join(self.recipe.out, path), data)


def _splits(recipe: EvaluateRecipe) -> set[str]:
    """Splits that the recipe names and uses."""
    used = {recipe.split}
    used |= {s.standardise_by for s in recipe.systems if isinstance(s, AverageEmbedding)}
    if any(isinstance(s, Fusion) and recipe.tuned(s) for s in recipe.systems):
        used.add(recipe.tuning_split)
    return {split for split in used if split is not None}


def _read_shard(piece: tuple[str, list[str]], reader: StoreReader) -> pa.Table:
    return shard_material(reader, *piece)
