"""A trained network as a folder that others can load: weights, settings, and a card that says what it is.

model.safetensors   weights
config.json         settings, what it was trained on, and what it reaches; written last
README.md           the same for people
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from wealy_ray.config import Settings
from wealy_ray.errors import StoreError
from wealy_ray.model.networks import StateNetwork, build_model
from wealy_ray.model.settings import KindName, ModelSettings
from wealy_ray.storage import ObjectMissingError, Storage, join

FORMAT: Literal[1] = 1


class ModelConfig(Settings):
    """What `config.json` holds."""

    format: Literal[1] = FORMAT
    model: ModelSettings
    input_dim: int = Field(gt=0, le=65536)
    digest: str
    """Of weights and `model`, see `digest_of`."""
    extractor_id: str
    """What the states must have been computed with; of sentences: the id of their store."""
    crop: PositiveInt
    """States of a window; what the network was trained on."""
    kinds: tuple[KindName, ...] | None = None
    """Kinds of states that count; None: all."""
    sentences: str | None = None
    """The sentence encoder whose vectors it is fed (`training.sentences`); None: states."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Manifest digest, splits, counts."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """What was measured, and on what."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A loaded model directory.

    Attributes:
        network: In evaluation mode, on the CPU.
        config: What it says of itself.
    """

    network: StateNetwork
    config: ModelConfig

    def check_extractor(self, extractor_id: str) -> None:
        """Refuses states that the network does not know.

        Raises:
            StoreError: Another extractor's.
        """
        trained = self.config.extractor_id
        if extractor_id == trained:
            return
        if self.config.sentences is not None:
            raise StoreError(
                f"this model is fed sentences as vectors of '{self.config.sentences}', whose store is {trained}, not "
                f"{extractor_id}: name the folder `sentences` of its training as the store"
            )
        raise StoreError(
            f"this model was trained on states of extractor {trained}, these are of {extractor_id}: extract with the "
            "same weights and settings, or train on these states"
        )


def save_model(storage: Storage, uri: str, network: StateNetwork, config: ModelConfig, card: str) -> None:
    """Writes a model directory; `config.json` comes last, so who finds it finds all."""
    weights = {name: _plain(tensor) for name, tensor in network.state_dict().items()}
    storage.write(join(uri, "model.safetensors"), save_tensors(weights))
    storage.write(join(uri, "README.md"), card.encode())
    storage.write(join(uri, "config.json"), (config.model_dump_json(indent=2) + "\n").encode())


def load_model(uri: str, storage: Storage | None = None) -> TrainedModel:
    """Loads a model directory.

    Args:
        uri: Its path or URI.
        storage: Access; None: with the usual environment.

    Raises:
        StoreError: It is not there, damaged, or of another format.
    """
    config, weights = read_model(storage or Storage(), uri)
    network = build_model(config.model, config.input_dim)
    try:
        network.load_state_dict(weights)
    except RuntimeError as e:
        raise StoreError(f"{uri}/model.safetensors does not fit its config.json") from e
    return TrainedModel(network.eval().requires_grad_(False), config)


def read_model(storage: Storage, uri: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """What a model directory holds; the weights are those that it was written with.

    Raises:
        StoreError: See `load_model`.
    """
    try:
        config = ModelConfig.model_validate(json.loads(storage.read(join(uri, "config.json"))))
        weights = load_tensors(storage.read(join(uri, "model.safetensors")))
    except ObjectMissingError as e:
        raise StoreError(f"there is no model at {uri}: it has no config.json or no model.safetensors") from e
    except SafetensorError as e:
        raise StoreError(f"{uri}/model.safetensors is damaged") from e
    except (ValueError, ValidationError) as e:
        raise StoreError(f"{uri}/config.json is damaged, or of another version of wealy-ray") from e
    if digest_of(weights, config.model) != config.digest:
        raise StoreError(
            f"{uri} holds other weights or settings than its digest says: it was changed, or made by an older version; "
            "take a copy that was not, or train it anew"
        )
    return config, weights


def digest_of(weights: Mapping[str, Tensor], settings: ModelSettings | None = None) -> str:
    """BLAKE2b of names, shapes and bytes of tensors and of what is built with them, 32 hexadecimal digits.

    Two networks of one digest give the same vectors: heads and positions leave no trace in the weights.
    """
    digest = hashlib.blake2b(digest_size=16)
    if settings is not None:
        digest.update(settings.model_dump_json(exclude_none=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_plain(tensor).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
