"""Networks that turn states into one vector per track, their losses, and folders that hold them. torch only."""

from wealy_ray.model.directory import (
    ModelConfig,
    TrainedModel,
    digest_of,
    load_model,
    read_model,
    save_model,
)
from wealy_ray.model.gather import gather_with_gradient
from wealy_ray.model.losses import Loss, LossSettings, build_loss
from wealy_ray.model.networks import StateNetwork, build_model
from wealy_ray.model.settings import AverageMLPSettings, ModelSettings, TransformerSettings

__all__ = [
    "AverageMLPSettings",
    "Loss",
    "LossSettings",
    "ModelConfig",
    "ModelSettings",
    "StateNetwork",
    "TrainedModel",
    "TransformerSettings",
    "build_loss",
    "build_model",
    "digest_of",
    "gather_with_gradient",
    "load_model",
    "read_model",
    "save_model",
]
