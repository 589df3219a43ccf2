"""Losses by their settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from wealy_ray.config import Settings
from wealy_ray.model.losses.clews import clews
from wealy_ray.model.losses.nt_xent import nt_xent
from wealy_ray.model.losses.supervised_contrastive import supervised_contrastive
from wealy_ray.model.losses.triplet import triplet

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class NTXentSettings(Settings):
    """The paper's loss."""

    kind: Literal["nt_xent"] = "nt_xent"
    temperature: float = Field(default=0.1, gt=0)


class SupervisedContrastiveSettings(Settings):
    """As NT-Xent, with the mean over positives outside the log."""

    kind: Literal["supervised_contrastive"] = "supervised_contrastive"
    temperature: float = Field(default=0.1, gt=0)


class TripletSettings(Settings):
    """`first` is what the paper's ablation used."""

    kind: Literal["triplet"] = "triplet"
    margin: float = Field(default=0.1, ge=0)
    choice: Literal["first", "hardest"] = "first"


class ClewsSettings(Settings):
    """The paper's second ablation."""

    kind: Literal["clews"] = "clews"
    gamma: float = Field(default=8.0, gt=0)
    bias: float = 1.0
    weight: float = Field(default=0.5, ge=0)


LossSettings = Annotated[
    NTXentSettings | SupervisedContrastiveSettings | TripletSettings | ClewsSettings,
    Field(discriminator="kind"),
]

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt_xent": nt_xent,
    "supervised_contrastive": supervised_contrastive,
    "triplet": triplet,
    "clews": clews,
}


def build_loss(settings: LossSettings) -> Loss:
    """A loss with its settings applied."""
    return partial(_LOSSES[settings.kind], **settings.model_dump(exclude={"kind"}))
