"""The store: immutable shards of decoder states, the index that commits them, and random access to both."""

from wealy_ray.store.adopt import Adoption, adopt
from wealy_ray.store.cache import TrackCache
from wealy_ray.store.done import split_work
from wealy_ray.store.extractor import ExtractorSpec, list_extractors
from wealy_ray.store.index import Index, IndexWriter, counts_of, one_per_track, read_index, read_latest
from wealy_ray.store.lease import Lease
from wealy_ray.store.payloads import Payloads
from wealy_ray.store.reader import StoreReader
from wealy_ray.store.schema import INDEX_SCHEMA, SHARD_SCHEMA, TrackStates, WindowInfo
from wealy_ray.store.shard import read_receipt, verify_shard, write_shard

__all__ = [
    "INDEX_SCHEMA",
    "SHARD_SCHEMA",
    "Adoption",
    "ExtractorSpec",
    "Index",
    "IndexWriter",
    "Lease",
    "Payloads",
    "StoreReader",
    "TrackCache",
    "TrackStates",
    "WindowInfo",
    "adopt",
    "counts_of",
    "list_extractors",
    "one_per_track",
    "read_index",
    "read_latest",
    "read_receipt",
    "split_work",
    "verify_shard",
    "write_shard",
]
