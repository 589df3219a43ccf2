"""Ranks of one system after the other, by shards of queries that Ray workers take.

Each shard becomes one file, in a folder whose name is a digest of all that its ranks depend on: a run that was stopped
goes on where it was, a recipe with one system more ranks that one only, and ranks of something else are never mixed in.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wealy_ray.errors import ReconciliationError, StoreError
from wealy_ray.pipelines.session import Cluster
from wealy_ray.pipelines.sharing import share
from wealy_ray.progress import Progress
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.embedded import StoreVectors
from wealy_ray.retrieval.evaluation import evaluate_tiles, num_tiles
from wealy_ray.retrieval.imports import is_mapping
from wealy_ray.retrieval.recipe import (
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
from wealy_ray.storage import ObjectMissingError, Storage, join
from wealy_ray.store import StoreReader

log = logging.getLogger(__name__)

RANKS_VERSION = 1
"""Moved when ranks would differ: shards of another version are not gone on from."""


class RankKeys:
    """A digest per system of everything that its ranks depend on.

    Args:
        recipe: The evaluation.
        storage: Where its files are.
        manifest_digest: Of its manifest.
        reader: Its store, if it has one.
    """

    def __init__(
        self, recipe: EvaluateRecipe, storage: Storage, manifest_digest: str, reader: StoreReader | None
    ) -> None:
        self._recipe, self._storage, self._reader = recipe, storage, reader
        self._systems = {name_of(s): s for s in recipe.systems}
        resources = recipe.resources
        self._common = [
            RANKS_VERSION,
            QUERY_TILE,
            [resources.threads, resources.tiles_per_shard, resources.gpus > 0],
            recipe.model_dump(
                mode="json",
                include={"split", "query_kinds", "candidate_kinds", "languages", "without_states", "seed"},
            ),
            manifest_digest,
            [reader.extractor_id, reader.index.number] if reader else None,
        ]

    def of(self, name: str) -> str:
        """The digest of a system; the rows that stand in every table have one, too."""
        system = self._systems.get(name)
        facts: list[Any] = [self._common, name]
        if system is not None:
            facts += [system.model_dump(mode="json"), self._version_of(system)]
        if isinstance(system, Fusion):
            facts.append([self.of(part) for part in system.of])
            facts.append(self._recipe.tuning_split if self._recipe.tuned(system) else None)
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    def _version_of(self, system: SystemSettings) -> Sequence[Any]:
        """Changes whenever a file does that the system is made of, those of the store's extraction excepted."""
        uris: list[str] = []
        if isinstance(system, DistanceMatrix):
            uris = [system.uri, system.ids]
        elif isinstance(system, SentenceBaseline):
            uris = [system.model]  # a folder, maybe; a name has no files here
        elif isinstance(system, Embeddings):
            if system.uri is None:
                assert self._reader is not None, "the recipe was checked"
                return StoreVectors.open(self._storage, self._reader.root, system.embedder_id).version
            uris = [system.uri, *([system.id_from_path] if is_mapping(system.id_from_path) else [])]
        return [version for uri in uris for version in self._versions(uri)]

    def _versions(self, uri: str) -> Sequence[Any]:
        try:
            infos = [self._storage.info(uri)]
        except ObjectMissingError:
            infos = list(self._storage.list(uri))
        return [[i.uri, i.etag, i.size] for i in infos]


@dataclass(frozen=True, eq=False)
class Ranking:
    """One system's scores and where its ranks go: what all shards share.

    Attributes:
        name: The system.
        scores: Its scores.
        collection: The tracks.
        folder: Of the shards' files.
        resources: Of the workers.
        storage: Where the folder is.
    """

    name: str
    scores: Scores
    collection: Collection
    folder: str
    resources: EvaluateResources
    storage: Storage

    def rows(self, cluster: Cluster, progress_every_s: float) -> tuple[pa.Table, int]:
        """Rows of all queries, and how many shards were ranked now; others were there.

        Raises:
            ReconciliationError: The shards' queries are not those of the collection.
            StoreError: A shard that an earlier run left is damaged.
        """
        num_shards = math.ceil(num_tiles(self.collection) / self.resources.tiles_per_shard)
        there = {info.uri.rsplit("/", 1)[-1] for info in self.storage.list(self.folder)}
        left = [n for n in range(num_shards) if f"{n:05d}.parquet" not in there]
        per_shard = self.resources.tiles_per_shard * QUERY_TILE
        total = len(self.collection.queries)
        before = sum(min(per_shard, total - n * per_shard) for n in range(num_shards) if n not in left)
        log.info("ranking by %s: %d queries, %d done before", self.name, total, before)
        progress = Progress(total, before, interval_s=progress_every_s)
        if left:
            for done in share(
                _rank_shard,
                left,
                self,
                cluster=cluster,
                cpus=self.resources.threads,
                gpus=self.resources.gpus,
                max_workers=self.resources.max_workers,
            ):
                progress.tick()
                if done is not None:
                    progress.add(done[1], 0, 0.0)
        rows = pa.concat_tables([self._read(n) for n in range(num_shards)])
        asked = rows.filter(pc.equal(rows["view"], "all"))["track_id"].to_pylist()
        if sorted(asked) != sorted(self.collection.track_ids[self.collection.queries]):
            raise ReconciliationError(
                f"{total} queries were to be ranked by {self.name}, {len(set(asked))} were; remove {self.folder} "
                "and run the same command again"
            )
        return rows, len(left)

    def _read(self, shard: int) -> pa.Table:
        uri = self._uri(shard)
        try:
            return pq.read_table(pa.BufferReader(self.storage.read(uri)))
        except (pa.ArrowException, OSError) as e:
            raise StoreError(f"{uri} is damaged; remove it and run the same command again") from e

    def _uri(self, shard: int) -> str:
        return join(self.folder, f"{shard:05d}.parquet")


def _rank_shard(shard: int, ranking: Ranking) -> int:
    """Ranks a shard's queries and writes them; returns how many there were."""
    import torch

    resources, collection = ranking.resources, ranking.collection
    torch.set_num_threads(resources.threads)
    device = torch.device("cuda" if resources.gpus else "cpu")
    first = shard * resources.tiles_per_shard
    tiles = range(first, min(first + resources.tiles_per_shard, num_tiles(collection)))
    tables = evaluate_tiles(ranking.scores, collection, tiles, device=device, num_threads=resources.threads)
    table = pa.concat_tables(tables)
    ranking.storage.write(ranking._uri(shard), as_parquet(table))
    return pc.sum(pc.equal(table["view"], "all")).as_py() or 0


def as_parquet(table: pa.Table) -> bytes:
    """A table as the bytes of a file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def file_name(name: str) -> str:
    """A system's name as a file name; a digest keeps names apart that differ in odd characters only."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    return f"{plain}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"
