"""One training as a whole, before and around its loop: what it is made of, and what it leaves.

<out>/training.json   what the training is; written once, so that a second start goes on with the same store
<out>/checkpoints/    see `checkpoint`
<out>/history.json    losses and MAPs by epoch
<out>/sentences/      a store of sentences, where those are trained on
<out>/model/          the best checkpoint as a model directory, when training has ended
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from wealy_ray.catalog import Manifest, read_manifest
from wealy_ray.errors import ManifestError, StoreError
from wealy_ray.model import ModelConfig, digest_of, save_model
from wealy_ray.storage import ObjectMissingError, Storage, join
from wealy_ray.store import StoreReader, TrackCache
from wealy_ray.training.card import model_card
from wealy_ray.training.checkpoint import Checkpoints, DamagedError, Progression, check_facts
from wealy_ray.training.crops import CropReader, kinds_by_name
from wealy_ray.training.data import Tracks
from wealy_ray.training.loop import Loop, Splits
from wealy_ray.training.recipe import TrainRecipe
from wealy_ray.training.sampler import CliqueSampler
from wealy_ray.training.sentences import sentence_reader

log = logging.getLogger(__name__)

NUMERICS_VERSION = 1
"""Moved when the same recipe would train other weights."""


@dataclass(frozen=True, eq=False)
class Job:
    """A training that was checked.

    Attributes:
        recipe: With the extractor and index that count.
        storage: Access.
        manifest: The tracks.
        reader: The store.
    """

    recipe: TrainRecipe
    storage: Storage
    manifest: Manifest
    reader: StoreReader

    @classmethod
    def open(cls, recipe: TrainRecipe) -> Job:
        """Reads manifest and index; nothing is written.

        Raises:
            WealyError: Something is missing, or `out` holds another training.
        """
        storage = Storage(recipe.storage)
        manifest = read_manifest(storage, recipe.manifest)
        storage.check_folder(recipe.out)
        found = _facts_in(storage, recipe.out)
        index = recipe.index or (found or {}).get("index")
        extractor_id = recipe.extractor_id or (found or {}).get("extractor_id")
        reader = StoreReader.open(storage, recipe.store, extractor_id, index)
        fixed = {"extractor_id": reader.extractor_id, "index": reader.index.number}
        job = cls(recipe.model_copy(update=fixed), storage, manifest, reader)
        if found is not None:
            check_facts(found, job.facts, recipe.out)
        elif job.is_done:
            raise StoreError(
                f"{recipe.out} holds a model, but no training.json that says what it was trained on: give this "
                "training another `out`"
            )
        return job

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a training to go on; the number of workers need not, if all gather."""
        names = {"model", "loss", "gather", "data", "optimiser", "validation", "mining", "seed"}
        workers = {"workers": self.recipe.resources.workers} if self.recipe.gather == "none" else {}
        return {
            **workers,
            "numerics_version": NUMERICS_VERSION,
            "manifest_digest": self.manifest.digest,
            "extractor_id": self.reader.extractor_id,
            "index": self.reader.index.number,
            "passes": self.recipe.resources.passes,
            **self.recipe.model_dump(mode="json", include=names),
        }

    @cached_property
    def fed(self) -> StoreReader:
        """The store that the network is fed from: of states, or of sentences, which are encoded when it is asked for.

        Raises:
            WealyError: See `sentence_reader`.
        """
        model, folder = self.recipe.data.sentences, join(self.recipe.out, "sentences")
        if model is None:
            return self.reader
        # of all splits: whoever embeds the others later finds theirs
        track_ids = self.manifest.table["track_id"].to_pylist()
        return sentence_reader(self.reader, folder, model, track_ids, self.recipe.progress_every_s)

    @cached_property
    def splits(self) -> Splits:
        """The tracks of both splits.

        Raises:
            ManifestError: A split cannot be used.
        """
        data = self.recipe.data
        resources = self.recipe.resources
        num_bytes = round(resources.cache_gib * 2**30)
        cache = TrackCache(resources.cache_dir, num_bytes) if num_bytes else None
        crops = CropReader(self.fed, data.crop, kinds_by_name(data.kinds), cache)
        table, uri = self.manifest.table, self.recipe.manifest
        train, validation = (
            Tracks.of_split(table, uri, split, crops) for split in (data.train_split, data.validation_split)
        )
        # says so when there is nothing to tell apart
        CliqueSampler(train.cliques, cliques_per_batch=data.cliques_per_batch)
        workers, slots = resources.most_workers, min(num_cliques(train), data.cliques_per_batch)
        if self.recipe.gather == "none" and slots < 2 * workers:
            raise ManifestError(
                f"with gather: none each of {workers} workers needs two cliques of its own to tell apart, a batch has "
                f"{slots}; take fewer workers, or gather: all"
            )
        if not num_cliques(validation):
            raise ManifestError(
                f"split '{data.validation_split}' of {uri} has no clique with two versions that have states: "
                "nothing could be measured"
            )
        return Splits(train, validation, crops)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Those of this training."""
        return Checkpoints(self.storage, self.recipe.out, self.facts)

    @property
    def model_uri(self) -> str:
        """Where the model is when training has ended."""
        return join(self.recipe.out, "model")

    @property
    def is_done(self) -> bool:
        """Whether the model is there; `open` has made sure that it is of this training."""
        return self.storage.exists(join(self.model_uri, "config.json"))

    def begin(self) -> None:
        """Writes down what this training is.

        Raises:
            StoreError: Another one was begun here at the same moment.
        """
        uri, data = join(self.recipe.out, "training.json"), json.dumps(self.facts, indent=1) + "\n"
        if not self.storage.write_if_absent(uri, data.encode()):
            check_facts(_facts_in(self.storage, self.recipe.out) or {}, self.facts, self.recipe.out)

    def counts(self) -> dict[str, dict[str, int]]:
        """Tracks and cliques of both splits."""
        return {
            name: {"tracks": len(tracks), "cliques": num_cliques(tracks), "dropped": tracks.num_dropped}
            for name, tracks in (("train", self.splits.train), ("validation", self.splits.validation))
        }

    def history(self) -> list[dict[str, float]]:
        """Losses and MAPs by epoch, up to the last checkpoint."""
        found = _read_json(self.storage, self._history_uri)
        return found if isinstance(found, list) else []

    @cached_property
    def languages(self) -> dict[str, int]:
        """Training tracks by language, most first.

        The one that Whisper was told to write in; else the manifest's, else what Whisper has heard.
        """
        train = self.splits.train
        decode = self._extractor.get("decode") or {}
        told = "en" if decode.get("task") == "translate" else decode.get("language")
        if told:
            return {told: len(train)}
        places = self.reader.index.positions(pa.array(train.track_ids, pa.string()))
        heard = self.reader.index.table["language"].take(places).to_pylist()
        counts = Counter(own or other or "" for own, other in zip(train.languages, heard, strict=True))
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def save(self, loop: Loop) -> str:
        """Writes a checkpoint and the history; returns the checkpoint's URI."""
        optimiser, progression = loop.state()
        config = self._config(loop, progression)
        uri = self.checkpoints.write(
            loop.network, optimiser, progression, config, self._card(config, loop, "A checkpoint")
        )
        self._write_history(progression)
        return uri

    def finish(self, loop: Loop) -> None:
        """Writes the best checkpoint as the model.

        Raises:
            StoreError: It is gone or damaged.
        """
        self._write_history(loop.progression)  # a driver that was thought dead may have written an older one
        weights, progression = self._read_best(loop.progression.best_epoch)
        loop.network.load_state_dict(weights)
        config = self._config(loop, progression)
        card = self._card(config, loop, f"WEALY model {config.digest[:8]}")
        save_model(self.storage, self.model_uri, loop.network, config, card)

    def _read_best(self, epoch: int) -> tuple[dict[str, Tensor], Progression]:
        """An epoch that was done twice, after a fault, has two checkpoints with the same weights."""
        places = self.checkpoints.places()
        for place in places:
            if (place.epoch, place.step) == (epoch, 0):
                try:
                    weights, _, progression = self.checkpoints.read(place)
                except DamagedError as e:
                    log.warning("%s", e)
                else:
                    return weights, progression
        good = next((place for place in reversed(places) if self.checkpoints.is_whole(place)), None)
        last = (
            "" if good is None else f"{good.name} there is the last good one, and a model directory too; or "
        )
        raise StoreError(
            f"the checkpoint of the best epoch, {epoch}, is gone from {self.checkpoints.root} or damaged; {last}train "
            "anew with another `out`"
        )

    @property
    def _history_uri(self) -> str:
        return join(self.recipe.out, "history.json")

    def _write_history(self, progression: Progression) -> None:
        self.storage.write(self._history_uri, (json.dumps(progression.history, indent=1) + "\n").encode())

    def _config(self, loop: Loop, progression: Progression) -> ModelConfig:
        # of these very weights, not of older ones
        measured = (
            progression.history[-1].get("map") if progression.history and not progression.step else None
        )
        data = self.recipe.data
        return ModelConfig(
            model=self.recipe.model,
            input_dim=loop.input_dim,
            digest=digest_of(loop.network.state_dict(), self.recipe.model),
            extractor_id=self.fed.extractor_id,
            crop=data.crop,
            kinds=data.kinds,
            sentences=data.sentences,
            data={
                "manifest": self.manifest.digest,
                "index": self.reader.index.number,
                **self.counts(),
                "languages": self.languages,
            },
            metrics={
                "validation_map": measured,
                "epochs": progression.epoch,
                "loss": self.recipe.loss.kind,
            },
        )

    def _card(self, config: ModelConfig, loop: Loop, title: str) -> str:
        return model_card(config, self._extractor, loop.num_parameters, title)

    @cached_property
    def _extractor(self) -> dict[str, Any]:
        return _read_json(self.storage, join(self.fed.root, "extractor.json")) or {}


def num_cliques(tracks: Tracks) -> int:
    """Cliques with two tracks or more."""
    return int((np.bincount(tracks.cliques[tracks.cliques >= 0]) > 1).sum())


def _facts_in(storage: Storage, out: str) -> dict[str, Any] | None:
    found = _read_json(storage, join(out, "training.json"))
    if found is not None and not isinstance(found, dict):
        raise StoreError(f"{out}/training.json is damaged: give this training another `out`")
    return found


def _read_json(storage: Storage, uri: str) -> Any:
    try:
        return json.loads(storage.read(uri))
    except ObjectMissingError:
        return None
    except ValueError as e:
        raise StoreError(f"{uri} is damaged: remove it to start anew") from e
