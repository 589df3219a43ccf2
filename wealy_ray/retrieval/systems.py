"""From the recipe's systems to scores over one collection."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wealy_ray.errors import ConfigError, StoreError
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.embedded import StoreVectors
from wealy_ray.retrieval.imports import PackedVectors, ParquetVectors, VectorSource, open_embeddings
from wealy_ray.retrieval.material import Material
from wealy_ray.retrieval.matrix import MatrixScores, read_matrix
from wealy_ray.retrieval.multi_vector import TILE_VECTORS, MultiVectorScores, PackedSets, VectorSets
from wealy_ray.retrieval.recipe import (
    AverageEmbedding,
    DistanceMatrix,
    Embeddings,
    Fusion,
    Oracle,
    SentenceBaseline,
    SystemSettings,
    TranscriptBaseline,
)
from wealy_ray.retrieval.scores import Scores, VectorScores
from wealy_ray.retrieval.stored_sets import StoredSets
from wealy_ray.retrieval.trivial import language_scores, oracle_scores, random_scores
from wealy_ray.storage import Storage, join

log = logging.getLogger(__name__)


def build_scores(
    system: SystemSettings,
    collection: Collection,
    material: Material | None,
    storage: Storage,
    *,
    scratch: str,
    held_bytes: int,
    states_root: str | None = None,
) -> Scores:
    """Scores of one system, a fusion excepted.

    Args:
        system: What to build.
        collection: The tracks.
        material: What the store has of them, and of the split to standardise by.
        storage: Where imported vectors lie.
        scratch: Folder for imported vectors that are too many to be held.
        held_bytes: What is too many.
        states_root: `<store>/<extractor-id>`, beside whose states embeddings may lie.

    Raises:
        ConfigError, StoreError: With one sentence.
    """
    if isinstance(system, Embeddings):
        source = _source(system, storage, states_root)
        sets = _sets(system, source, collection, storage, scratch=scratch, held_bytes=held_bytes)
        scores = MultiVectorScores(sets, collection.candidates, system.distance, system.reduction)
        return _known(scores, system, collection, system.uri or states_root)
    if isinstance(system, DistanceMatrix):
        read = read_matrix(storage, system.uri, system.ids)
        return _known(MatrixScores.of(collection, *read), system, collection, system.ids)
    assert material is not None, "the recipe was checked"
    if isinstance(system, AverageEmbedding):
        vectors, missing = material.means(list(collection.track_ids), system.positions)
        if system.standardise_by is not None:
            vectors = _standardised(vectors, missing, material, system)
        return VectorScores.cosine(collection, vectors, missing)
    texts = material.texts(collection)
    if isinstance(system, Oracle):
        return oracle_scores(collection, np.array([bool(text.strip()) for text in texts]))
    if isinstance(system, SentenceBaseline):
        from wealy_ray.retrieval.sentence import sentence_vectors
        from wealy_ray.retrieval.text import without_words

        missing = without_words(texts)
        return VectorScores.cosine(collection, sentence_vectors(texts, system.model), missing)
    assert isinstance(system, TranscriptBaseline)
    from wealy_ray.retrieval import text

    return getattr(text, system.kind)(collection, texts)


def standing_rows(collection: Collection, material: Material | None, seed: int) -> dict[str, Scores]:
    """The rows that stand in every table: chance, and the detected language alone."""
    rows: dict[str, Scores] = {"random": random_scores(collection, seed)}
    if material is not None:
        detected = material.languages(list(collection.track_ids))
        rows["same language"] = language_scores(collection, detected, seed)
    return rows


def fuse(
    system: Fusion,
    collection: Collection,
    built: Mapping[str, Scores],
    tuning: tuple[Collection, Mapping[str, Scores]] | None,
) -> tuple[Scores, dict[str, Any] | None]:
    """A fusion of two systems, and how its weight was chosen (None: it was given).

    That is `weights`, the `map` of each and which was `chosen`; or `fitted`, each system and its weight.

    Args:
        system: The fusion.
        collection: The evaluated tracks.
        built: Scores of the systems further up, over them.
        tuning: The tracks to choose on, and the same systems' scores over them; None: nothing is to be chosen.
    """
    from wealy_ray.retrieval.fusion import (
        LearnedFusion,
        RankFusion,
        WeightedScores,
        choose_weight,
        fit_fusion,
    )

    a, b = (built[name] for name in system.of)
    columns = collection.column_of
    if system.normalise == "rank":
        return RankFusion(a, b, columns), None
    if tuning is None:
        assert system.normalise != "learned", "the recipe was checked"
        assert system.weight != "tuned", "the recipe was checked"
        return WeightedScores(a, b, columns, system.weight, system.normalise), None
    on, scores = tuning
    tuning_a, tuning_b = (scores[name] for name in system.of)
    if system.normalise == "learned":
        fitted = fit_fusion(tuning_a, tuning_b, on)
        learned = LearnedFusion(a, b, columns, fitted.weight_a, fitted.weight_b)
        return learned, {"fitted": [[system.of[0], fitted.weight_a], [system.of[1], fitted.weight_b]]}
    curve, weight = choose_weight(tuning_a, tuning_b, on, system.weights, system.normalise)
    chosen = {"weights": [w for w, _ in curve], "map": [m for _, m in curve], "chosen": weight}
    return WeightedScores(a, b, columns, weight, system.normalise), chosen


def _standardised(
    vectors: np.ndarray, missing: np.ndarray, material: Material, system: AverageEmbedding
) -> np.ndarray:
    """Each dimension brought to mean 0 and variance 1 over the tracks of another split."""
    reference = _reference_ids(material, system)
    known, absent = material.means(reference, system.positions)
    known = known[~absent].astype(np.float64)
    if len(known) < 2:
        raise ConfigError(f"'{system.name}': split '{system.standardise_by}' has no two tracks with states")
    spread = known.std(axis=0)
    scaled = (vectors - known.mean(axis=0)) / np.where(spread == 0, 1, spread)
    return np.where(missing[:, None], 0, scaled).astype(np.float32)


def _reference_ids(material: Material, system: AverageEmbedding) -> Sequence[str]:
    splits = material.splits
    return [t for t, split in splits.items() if split == system.standardise_by]


def _known(
    scores: Scores, system: Embeddings | DistanceMatrix, collection: Collection, where: str | None
) -> Scores:
    """The scores, where they know one of the tracks at least: ids of another kind would pass for a poor system."""
    if scores.missing.all():
        raise ConfigError(
            f"'{system.name}' knows none of the {len(collection)} tracks that are compared: no id of {where} is one "
            f"of the manifest's, which are like '{collection.track_ids[0]}'"
        )
    return scores


def _source(system: Embeddings, storage: Storage, states_root: str | None) -> VectorSource:
    if system.uri is not None:
        return open_embeddings(storage, system.uri, system.id_from_path)
    assert states_root is not None, "the recipe was checked"
    return StoreVectors.open(storage, states_root, system.embedder_id)


def _sets(
    system: Embeddings,
    source: VectorSource,
    collection: Collection,
    storage: Storage,
    *,
    scratch: str,
    held_bytes: int,
) -> VectorSets:
    if source.num_bytes <= held_bytes:
        packed = PackedVectors.of(source)
        return PackedSets.of_collection(collection, packed.track_ids, packed.vectors, packed.offsets)
    if isinstance(source, ParquetVectors) and not source.is_ordered:
        raise StoreError(
            f"the vectors in {system.uri} take {source.num_bytes / 2**30:.1f} GiB, more than "
            "resources.held_gib, and are not in order: sort the rows by track_id and window, or raise it"
        )
    facts = json.dumps([list(source.version), list(collection.track_ids), TILE_VECTORS])
    key = hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
    log.info("%s: %.1f GiB of vectors are streamed from %s", system.name, source.num_bytes / 2**30, scratch)
    return StoredSets.write(storage, join(scratch, key), collection, source)
