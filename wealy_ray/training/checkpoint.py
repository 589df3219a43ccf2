"""What a training goes on from: everything that the next step depends on, in one folder of `<out>/checkpoints`.

model.safetensors, config.json, README.md   a model directory (see `model.directory`): any checkpoint can be used
state.pt       optimiser, place in the run, best score, mined neighbours; tensors and plain values only
facts.json     what the training is, and a checksum of state.pt; written last: a folder without it is no checkpoint

Folders are named by epoch and step, and never overwritten: a driver or worker that was thought dead and writes late
does no harm.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wealy_ray.errors import StoreError, WealyError
from wealy_ray.model import ModelConfig, StateNetwork, read_model, save_model
from wealy_ray.storage import ObjectMissingError, Storage, join

log = logging.getLogger(__name__)

LAST_KEPT = 2
"""Checkpoints that are kept beside the best: if the last should be damaged, the one before it counts."""


@dataclass
class Progression:
    """Where a training is.

    Attributes:
        epoch: Epochs that are done.
        step: Steps of the next epoch that are done.
        best_map: Best validation MAP so far; -1 before the first.
        best_epoch: Epochs that were done then.
        measured_without_gain: Measurements since.
        history: One entry per measurement and epoch: losses, MAPs, rates.
        neighbours: Mined cliques, int64 [num_cliques, K]; None without mining.
        sums: What the running epoch adds up: loss, steps, padded positions.
    """

    epoch: int = 0
    step: int = 0
    best_map: float = -1.0
    best_epoch: int = -1
    measured_without_gain: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    neighbours: Tensor | None = None
    sums: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A checkpoint, by its name.

    Attributes:
        name: Of its folder.
        epoch: Epochs that were done.
        step: Steps of the next one that were done.
    """

    name: str
    epoch: int
    step: int


class Checkpoints:
    """The checkpoints of one training.

    Args:
        storage: Access.
        out: Folder of the run.
        facts: What must be the same for a training to go on.
    """

    def __init__(self, storage: Storage, out: str, facts: dict[str, Any]) -> None:
        self.storage, self.root, self.facts = storage, join(out, "checkpoints"), facts

    def write(
        self,
        network: StateNetwork,
        optimiser: dict[str, Any],
        progression: Progression,
        config: ModelConfig,
        card: str,
    ) -> str:
        """Writes a checkpoint, then removes those that are neither the best nor among the last; returns its URI."""
        name = f"{progression.epoch:05d}-{progression.step:06d}-{uuid.uuid4().hex[:8]}"
        uri = join(self.root, name)
        save_model(self.storage, uri, network, config, card)
        sink = io.BytesIO()
        torch.save({"optimiser": optimiser, "progression": vars(progression)}, sink)
        self.storage.write(join(uri, "state.pt"), sink.getvalue())
        facts = {**self.facts, "state_digest": _digest(sink.getvalue())}
        self.storage.write(join(uri, "facts.json"), (json.dumps(facts, indent=1) + "\n").encode())
        self._thin_out(progression)
        return uri

    def places(self) -> list[Place]:
        """All complete checkpoints, oldest first; of the same place in the run in the order of their names."""
        found = []
        for info in self.storage.list(self.root):
            match = re.search(r"/((\d{5})-(\d{6})-[0-9a-f]{8})/facts\.json$", info.uri)
            if match:
                found.append(Place(match[1], int(match[2]), int(match[3])))
        return sorted(found, key=lambda p: (p.epoch, p.step, p.name))

    def read_latest(self) -> tuple[dict[str, Tensor], dict[str, Any], Progression] | None:
        """Weights, optimiser and progression to go on from; None: there is no checkpoint.

        Raises:
            StoreError: The checkpoint is of another training, or all are damaged.
        """
        places = self.places()
        for place in reversed(places):
            try:
                return self.read(place)
            except DamagedError as e:
                log.warning("%s; the one before it is used", e)
        if places:
            raise StoreError(f"all checkpoints in {self.root} are damaged: remove them to start anew")
        return None

    def read(self, place: Place) -> tuple[dict[str, Tensor], dict[str, Any], Progression]:
        """One checkpoint.

        Raises:
            StoreError: It is of another training.
            DamagedError: Bytes are missing, or others than were written.
        """
        uri = join(self.root, place.name)
        try:
            found = json.loads(self.storage.read(join(uri, "facts.json")))
            data = self.storage.read(join(uri, "state.pt"))
            if found.pop("state_digest") != _digest(data):
                raise StoreError(f"{uri}/state.pt holds other bytes than were written")
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            _, weights = read_model(self.storage, uri)
        except Exception as e:  # torch raises errors of many kinds for what it cannot read
            if isinstance(e, WealyError) and not isinstance(e, ObjectMissingError | StoreError):
                raise
            raise DamagedError(f"the checkpoint {uri} is damaged ({type(e).__name__})") from e
        check_facts(found, self.facts, uri)
        return weights, state["optimiser"], Progression(**state["progression"])

    def is_whole(self, place: Place) -> bool:
        """Whether a checkpoint can be read."""
        try:
            self.read(place)
        except DamagedError:
            return False
        return True

    def _thin_out(self, progression: Progression) -> None:
        # who is behind, and was thought dead, knows nothing of what came later
        here = (progression.epoch, progression.step)
        places = [place for place in self.places() if (place.epoch, place.step) <= here]
        for place in places[:-LAST_KEPT]:
            if (place.epoch, place.step) == (progression.best_epoch, 0):
                continue
            uri = join(self.root, place.name)
            # without this file it is no checkpoint any more, whenever we are interrupted
            self.storage.delete(join(uri, "facts.json"))
            self.storage.delete_folder(uri)


class DamagedError(StoreError):
    """A checkpoint that cannot be read."""


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def check_facts(found: dict[str, Any], wanted: dict[str, Any], uri: str) -> None:
    """Refuses what another training has left.

    Raises:
        StoreError: With what differs.
    """
    ours, theirs = _plain(wanted), _plain(found)
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        raise StoreError(
            f"{uri} is of another training: {', '.join(differing)} differ{'s' * (len(differing) == 1)}; give this one "
            "another `out`, or go back to the old settings"
        )


def _plain(value: Any) -> Any:
    """As it comes back from JSON; a setting that is None is as one that was not known yet."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
