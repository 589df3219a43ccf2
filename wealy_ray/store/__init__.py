"""The store: immutable shards of states and of embeddings, the indexes that commit them, and access to both."""

from wealy_ray.store.adopt import Adoption, adopt
from wealy_ray.store.cache import TrackCache
from wealy_ray.store.done import lie_in, lost_shards, split_work
from wealy_ray.store.embedder import EmbedderSpec, embeddings_folder, kept_model, list_embedders
from wealy_ray.store.embedding_reader import EmbeddingReader, count_stale
from wealy_ray.store.embeddings import (
    EMBEDDING_INDEX_SCHEMA,
    TrackVectors,
    adopt_embeddings,
    is_embedded,
    write_vectors,
)
from wealy_ray.store.extractor import ExtractorSpec, list_extractors
from wealy_ray.store.index import Index, IndexWriter, counts_of, one_per_track, read_index, read_latest
from wealy_ray.store.lease import Lease
from wealy_ray.store.payloads import Payloads
from wealy_ray.store.reader import StoreReader
from wealy_ray.store.releases import Release, newest_release, publish_release, released_embeddings
from wealy_ray.store.schema import INDEX_SCHEMA, SHARD_SCHEMA, TrackStates, WindowInfo
from wealy_ray.store.shard import read_receipt, verify_shard, write_shard

__all__ = [
    "EMBEDDING_INDEX_SCHEMA",
    "INDEX_SCHEMA",
    "SHARD_SCHEMA",
    "Adoption",
    "EmbedderSpec",
    "EmbeddingReader",
    "ExtractorSpec",
    "Index",
    "IndexWriter",
    "Lease",
    "Payloads",
    "Release",
    "StoreReader",
    "TrackCache",
    "TrackStates",
    "TrackVectors",
    "WindowInfo",
    "adopt",
    "adopt_embeddings",
    "count_stale",
    "counts_of",
    "embeddings_folder",
    "is_embedded",
    "kept_model",
    "lie_in",
    "list_embedders",
    "list_extractors",
    "lost_shards",
    "newest_release",
    "one_per_track",
    "publish_release",
    "read_index",
    "read_latest",
    "read_receipt",
    "released_embeddings",
    "split_work",
    "verify_shard",
    "write_shard",
    "write_vectors",
]
