"""Sizes and choices of the networks; part of every recipe and of every model directory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from wealy_ray.config import Settings

KindName = Literal["prompt", "sot", "text", "timestamp", "eot"]
"""What a state predicts, see `wealy_ray.whisper.types.Kind`."""


class TransformerSettings(Settings):
    """WEALY: states -> Linear -> Transformer encoder -> pooling -> Linear. The defaults are the paper's."""

    kind: Literal["transformer"] = "transformer"
    width: PositiveInt = 768
    """Numbers per position inside."""
    layers: PositiveInt = 4
    heads: PositiveInt = 12
    feed_forward: PositiveInt = 1024
    """Width between the two maps of a layer's feed-forward part."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    positions: Literal["none", "sinusoidal", "rotary"] = "none"
    """`none` as the paper: the order of states is not seen."""
    pooling: Literal["gem", "mean", "cls", "attention"] = "gem"
    output_dim: PositiveInt = 512
    """Numbers of an embedding."""
    standardise: bool = False
    """Bring each dimension of the states to mean 0 and variance 1 over the training tracks: after Whisper's last
    LayerNorm a few channels are huge."""

    @model_validator(mode="after")
    def _heads_fit(self) -> TransformerSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.positions == "rotary" and (self.width // self.heads) % 2:
            raise ValueError(
                f"rotary positions need an even width per head; it is {self.width // self.heads}"
            )
        return self


class AverageMLPSettings(Settings):
    """The paper's baseline without time: the mean of the states, then an MLP."""

    kind: Literal["avg_mlp"] = "avg_mlp"
    width: PositiveInt = 768
    hidden_layers: int = Field(default=2, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    output_dim: PositiveInt = 512
    standardise: bool = False
    """See `TransformerSettings`."""


ModelSettings = Annotated[TransformerSettings | AverageMLPSettings, Field(discriminator="kind")]
