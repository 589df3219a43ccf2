"""`wealy evaluate`: exact metrics of several systems over one collection, shared among Ray workers.

Queries are cut into tiles, tiles into shards of work; each shard becomes one file, so that a run that was stopped
goes on where it was. What is computed for a shard depends on nothing but its queries: any number of workers gives
the same bits.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wealy_ray.catalog import Manifest, read_manifest, tracks_of_split
from wealy_ray.errors import ReconciliationError, StoreError
from wealy_ray.pipelines.session import Cluster, check_room, connect
from wealy_ray.pipelines.sharing import share
from wealy_ray.progress import Progress
from wealy_ray.report.extract_summary import extraction_speed
from wealy_ray.report.run_record import RunRecord, now
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.embedded import StoreVectors
from wealy_ray.retrieval.evaluation import evaluate_tile, num_tiles
from wealy_ray.retrieval.facts import facts_of_embeddings
from wealy_ray.retrieval.imports import is_mapping
from wealy_ray.retrieval.material import Material, collection_of, shard_material, tracks_by_shard
from wealy_ray.retrieval.metrics import grouped, views_of
from wealy_ray.retrieval.recipe import (
    AverageEmbedding,
    DistanceMatrix,
    Embeddings,
    EvaluateRecipe,
    EvaluateResources,
    Fusion,
    SentenceBaseline,
    SystemSettings,
    name_of,
)
from wealy_ray.retrieval.scores import QUERY_TILE, Scores
from wealy_ray.retrieval.systems import build_scores, fuse, standing_rows
from wealy_ray.storage import ObjectMissingError, Storage, join
from wealy_ray.store import StoreReader, is_embedded

log = logging.getLogger(__name__)

RANKS_VERSION = 1
"""Moved when ranks would differ: shards of another version are not gone on from."""
SAMPLE_TRACKS = 60
"""Tracks in the similarity matrix of the report."""


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
        _check_embeddings(recipe, reader)
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


def _check_embeddings(recipe: EvaluateRecipe, reader: StoreReader) -> None:
    """The store's embeddings are there before anything runs; a warning when they are not those of its states now."""
    for system in recipe.systems:
        if isinstance(system, Embeddings) and system.uri is None:
            vectors = StoreVectors.open(reader.storage, reader.root, system.embedder_id)
            left = int((~is_embedded(reader.index.table, vectors.reader.index)).sum())
            if left:
                log.warning(
                    "%s: %d tracks have no vectors of their states as they are now; `wealy embed` makes them",
                    system.name,
                    left,
                )


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
        self.ranked: dict[str, int] = {}

    def execute(self) -> Evaluated:
        recipe = self.recipe
        material = self._material() if self.reader is not None else None
        collection = collection_of(recipe, self.manifest.table, material, recipe.split)
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
            name_of(s): facts_of_embeddings(self.storage, s.uri or self._stored(s).reader.root)
            for s in recipe.systems
            if isinstance(s, Embeddings)
        }
        # an earlier recipe's numbers would stand beside this one's queries, should this run be stopped
        self.storage.delete(join(recipe.out, "metrics.json"))
        entries = []
        for name, scores in systems.items():
            rows = self._ranked(name, scores, collection)
            path = f"per_query/{_file_name(name)}.parquet"
            self._write_table(path, rows)
            missing = int(scores.missing.sum())
            entries.append(
                {
                    "name": name,
                    "kind": kinds[name],
                    "facts": facts.get(name),
                    "missing": missing,
                    "per_query": path,
                    "views": views_of(rows),
                    "groups": grouped(rows),
                }
            )
        metrics = {
            "title": recipe.out.rstrip("/").rsplit("/", 1)[-1],
            "collection": self._counts(collection, material),
            "extraction": self._extraction(material),
            "systems": entries,
            "fusion_curves": curves,
            "fitted_fusions": fitted,
            "tuned_on_test": recipe.tunes_on_test,
        }
        self._leave_a_sample(collection, systems, material)
        # written last: who finds it finds everything it names
        self.storage.write(join(recipe.out, "metrics.json"), (json.dumps(metrics, indent=1) + "\n").encode())
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
        """Rows of all queries; shards that an earlier run left are taken as they are."""
        folder = join(self.recipe.out, "ranks", self._key(collection), _file_name(name))
        there = {info.uri.rsplit("/", 1)[-1] for info in self.storage.list(folder)}
        resources = self.recipe.resources
        shards = math.ceil(num_tiles(collection) / resources.tiles_per_shard)
        left = [n for n in range(shards) if f"{n:05d}.parquet" not in there]
        per_shard = resources.tiles_per_shard * QUERY_TILE
        total = len(collection.queries)
        before = sum(min(per_shard, total - n * per_shard) for n in range(shards) if n not in left)
        log.info("ranking by %s: %d queries, %d done before", name, total, before)
        progress = Progress(total, before, interval_s=self.recipe.progress_every_s)
        if left:
            for done in share(
                _rank_shard,
                left,
                _Ranking(scores, collection, folder, resources, self.storage),
                cluster=self.cluster,
                cpus=resources.threads,
                gpus=resources.gpus,
                max_workers=resources.max_workers,
            ):
                progress.tick()
                if done is not None:
                    progress.add(done[1], 0, 0.0)
        self.ranked[name] = len(left)
        tables = [self._read_table(join(folder, f"{n:05d}.parquet")) for n in range(shards)]
        rows = pa.concat_tables(tables)
        asked = rows.filter(pc.equal(rows["view"], "all"))["track_id"].to_pylist()
        if sorted(asked) != sorted(collection.track_ids[collection.queries]):
            raise ReconciliationError(
                f"{total} queries were to be ranked by {name}, {len(set(asked))} were; remove {folder} and run "
                "the same command again"
            )
        return rows

    def _key(self, collection: Collection) -> str:
        """Digest of all that ranks depend on: shards of something else are never mixed in."""
        recipe = self.recipe.model_dump(
            mode="json", exclude={"out", "storage", "progress_every_s", "resources"}
        )
        facts = [
            RANKS_VERSION,
            QUERY_TILE,
            self.recipe.resources.threads,
            self.recipe.resources.tiles_per_shard,
            self.recipe.resources.gpus > 0,
            recipe,
            self.manifest.digest,
            self.reader.extractor_id if self.reader else None,
            self.reader.index.number if self.reader else None,
            [self._version_of(s) for s in self.recipe.systems],
            len(collection),
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    def _stored(self, system: Embeddings) -> StoreVectors:
        """The store's own vectors."""
        assert self.reader is not None, "the recipe was checked"
        return StoreVectors.open(self.storage, self.reader.root, system.embedder_id)

    def _version_of(self, system: SystemSettings) -> Sequence[Any]:
        """Changes whenever a file does that the system is made of, those of the store's extraction excepted."""
        uris: list[str] = []
        if isinstance(system, DistanceMatrix):
            uris = [system.uri, system.ids]
        elif isinstance(system, SentenceBaseline):
            uris = [system.model]  # a folder, maybe; a name has no files here
        elif isinstance(system, Embeddings):
            if system.uri is None:
                return self._stored(system).version
            uris = [system.uri, *([system.id_from_path] if is_mapping(system.id_from_path) else [])]
        return [version for uri in uris for version in self._versions(uri)]

    def _versions(self, uri: str) -> Sequence[Any]:
        try:
            infos = [self.storage.info(uri)]
        except ObjectMissingError:
            infos = list(self.storage.list(uri))
        return [[i.uri, i.etag, i.size] for i in infos]

    def _counts(self, collection: Collection, material: Material | None) -> dict[str, Any]:
        recipe = self.recipe
        asked = self.manifest.table["split"].to_pylist()
        ids = self.manifest.table["track_id"].to_pylist()
        of_split = [t for t, s in zip(ids, asked, strict=True) if recipe.split is None or s == recipe.split]
        return {
            "tracks": len(of_split),
            "queries": len(collection.queries),
            "candidates": len(collection.candidates),
            "cliques": len(np.unique(collection.cliques[collection.queries])),
            "without_states": sum(t not in material for t in of_split) if material is not None else 0,
            "policy": recipe.without_states,
            "split": recipe.split,
        }

    def _extraction(self, material: Material | None) -> dict[str, Any] | None:
        if material is None or self.reader is None:
            return None
        index = self.reader.index.table
        rows = index.filter(
            pc.is_in(index["track_id"], value_set=self.manifest.table["track_id"].combine_chunks())
        )

        def counts(column: str) -> dict[str, int]:
            found = pc.value_counts(rows[column].drop_null()).to_pylist()
            return {v["values"]: v["counts"] for v in sorted(found, key=lambda v: -v["counts"])}

        status = counts("status")
        return {
            "tracks": rows.num_rows,
            "ok": status.get("ok", 0),
            "failed": status.get("failed", 0),
            "audio_s": pc.sum(rows["duration_s"]).as_py() or 0.0,
            "audio_s_per_s": extraction_speed(self.storage, self.reader.root),
            "states": pc.sum(rows["num_states"]).as_py() or 0,
            "languages": counts("language"),
            "failures": counts("error_type"),
            "states_per_track": material.table["num_states"].to_pylist()[:100_000],
            "no_speech": pc.list_flatten(material.table["no_speech"]).to_pylist()[:100_000],
        }

    def _leave_a_sample(
        self, collection: Collection, systems: Mapping[str, Scores], material: Material | None
    ) -> None:
        """Similarities of a few cliques by the first system that is no baseline row, and all transcripts."""
        name = next(name for name in systems if name not in ("random", "same language"))
        order = collection.queries[np.argsort(collection.cliques[collection.queries], kind="stable")]
        order = order[collection.is_candidate[order]][:SAMPLE_TRACKS]
        if len(order):
            sample = systems[name].rows(order).cpu().numpy()[:, collection.column_of[order]]
            sink = io.BytesIO()
            np.savez(
                sink,
                similarity=sample,
                track_ids=collection.track_ids[order].astype(str),
                clique_ids=np.array([collection.clique_names[c] for c in collection.cliques[order]]),
                system=np.array(name),
            )
            self.storage.write(join(self.recipe.out, "sample.npz"), sink.getvalue())
        if material is not None:
            self._write_table("transcripts.parquet", material.table.select(["track_id", "text"]))

    def _write_table(self, path: str, table: pa.Table) -> None:
        self.storage.write(join(self.recipe.out, path), _as_parquet(table))

    def _read_table(self, uri: str) -> pa.Table:
        try:
            return pq.read_table(pa.BufferReader(self.storage.read(uri)))
        except (pa.ArrowException, OSError) as e:
            raise StoreError(f"{uri} is damaged; remove it and run the same command again") from e


@dataclass(frozen=True, eq=False)
class _Ranking:
    """What all shards of one system share."""

    scores: Scores
    collection: Collection
    folder: str
    resources: EvaluateResources
    storage: Storage


def _rank_shard(shard: int, ranking: _Ranking) -> int:
    """Ranks a shard's queries and writes them; returns how many there were."""
    import torch

    resources, collection = ranking.resources, ranking.collection
    torch.set_num_threads(resources.threads)
    device = torch.device("cuda" if resources.gpus else "cpu")
    first = shard * resources.tiles_per_shard
    tiles = range(first, min(first + resources.tiles_per_shard, num_tiles(collection)))
    tables = [
        evaluate_tile(ranking.scores, collection, tile, device=device, num_threads=resources.threads)
        for tile in tiles
    ]
    table = pa.concat_tables(tables)
    ranking.storage.write(join(ranking.folder, f"{shard:05d}.parquet"), _as_parquet(table))
    return pc.sum(pc.equal(table["view"], "all")).as_py() or 0


def _splits(recipe: EvaluateRecipe) -> set[str]:
    """Splits that the recipe names and uses."""
    used = {recipe.split}
    used |= {s.standardise_by for s in recipe.systems if isinstance(s, AverageEmbedding)}
    if any(isinstance(s, Fusion) and recipe.tuned(s) for s in recipe.systems):
        used.add(recipe.tuning_split)
    return {split for split in used if split is not None}


def _read_shard(piece: tuple[str, list[str]], reader: StoreReader) -> pa.Table:
    return shard_material(reader, *piece)


def _as_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _file_name(name: str) -> str:
    """A system's name as a file name; a digest keeps names apart that differ in odd characters only."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    return f"{plain}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"
