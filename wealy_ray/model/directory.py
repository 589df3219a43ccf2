"""A trained network as a folder that others can load: weights, settings, and a card that says what it is.

model.safetensors   weights
config.json         settings, what it was trained on, and what it reaches; written last
README.md           the same for people
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from wealy_ray.config import Settings
from wealy_ray.errors import StoreError
from wealy_ray.model.networks import StateNetwork, build_model
from wealy_ray.model.settings import KindName, ModelSettings
from wealy_ray.storage import ObjectMissingError, Storage, join

FORMAT = 1


class ModelConfig(Settings):
    """What `config.json` holds."""

    format: int = FORMAT
    model: ModelSettings
    input_dim: int
    digest: str
    """Of the weights, see `digest_of`."""
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
    storage.write(join(uri, "model.safetensors"), save_tensors(_tensors(network)))
    storage.write(join(uri, "README.md"), card.encode())
    storage.write(join(uri, "config.json"), (config.model_dump_json(indent=2) + "\n").encode())


def load_model(uri: str, storage: Storage | None = None) -> TrainedModel:
    """Loads a model directory.

    Args:
        uri: Its path or URI.
        storage: Access; None: with the usual environment.

    Raises:
        StoreError: It is not there, damaged, or of a newer format.
    """
    storage = storage or Storage()
    try:
        config = ModelConfig.model_validate(json.loads(storage.read(join(uri, "config.json"))))
        weights = storage.read(join(uri, "model.safetensors"))
    except ObjectMissingError as e:
        raise StoreError(f"there is no model at {uri}: it has no config.json or no model.safetensors") from e
    except (ValueError, ValidationError) as e:
        raise StoreError(f"{uri}/config.json is damaged, or of another version of wealy-ray") from e
    network = build_model(config.model, config.input_dim)
    try:
        network.load_state_dict(load_tensors(weights))
    except (SafetensorError, RuntimeError) as e:
        raise StoreError(f"{uri}/model.safetensors is damaged, or does not fit its config.json") from e
    if digest_of(network) != config.digest:
        raise StoreError(f"{uri}/model.safetensors holds other weights than its config.json says")
    return TrainedModel(network.eval().requires_grad_(False), config)


def digest_of(network: nn.Module) -> str:
    """BLAKE2b of names, shapes and bytes of all tensors, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_tensors(network).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
