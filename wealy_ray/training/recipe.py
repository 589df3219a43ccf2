"""The recipe of a training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from wealy_ray.config import Settings, StorageSettings
from wealy_ray.model.losses import LossSettings
from wealy_ray.model.losses.build import NTXentSettings
from wealy_ray.model.settings import KindName, ModelSettings, TransformerSettings


class DataSettings(Settings):
    """Which tracks, and what of them."""

    train_split: str = "train"
    validation_split: str = "val"
    crop: PositiveInt = 1500
    """States (or sentences) of a training crop, at a random place; shorter tracks whole."""
    kinds: tuple[KindName, ...] | None = Field(default=None, min_length=1)
    """Kinds of states that count; None: all, as the paper. `[text]`: only those that predict text."""
    sentences: str | None = None
    """Name or folder of a sentence-transformers model: trains on its vectors of the transcripts' sentences instead of
    states, the paper's baseline on text. Needs the extra `text`."""
    cliques_per_batch: int = Field(default=64, ge=2)
    """Cliques of a global batch, over all workers. The paper's 64 + 64 tracks on each of 4 GPUs are 256 here."""
    versions_per_clique: int = Field(default=2, ge=2)
    """Versions of each, drawn at random; fewer where a clique has fewer."""
    epoch_by: Literal["cliques", "versions"] = "cliques"
    """An epoch has each clique once, or each version once as an anchor."""
    validate_on: Literal["first", "windows"] = "first"
    """The first `crop` states, as the paper; or windows over the whole track, the nearest pair counts."""

    @model_validator(mode="after")
    def _consistent(self) -> DataSettings:
        if self.sentences is not None and self.kinds is not None:
            raise ValueError("kinds are of states, and sentences have none: give one of the two")
        return self


class OptimiserSettings(Settings):
    """AdamW with a linear warm-up and a cosine to zero; the defaults are the paper's."""

    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    epochs: PositiveInt = 1000
    warmup_epochs: int = Field(default=50, ge=0)
    warmup_from: float = Field(default=0.005, gt=0, le=1)
    """First learning rate, as a share of `learning_rate`."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of all gradients together."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network's products; `auto` is bfloat16 on a GPU that has it. Losses are float32 always."""


class ValidationSettings(Settings):
    """When the model is measured, and when training ends early."""

    every_epochs: PositiveInt = 5
    patience: PositiveInt = 10
    """Measurements without a better MAP after which training ends."""


class MiningSettings(Settings):
    """Half of each batch from cliques that the last embeddings hardly tell from the other half."""

    every_epochs: PositiveInt = 5
    neighbours: PositiveInt = 10
    """Nearest cliques of a clique that are drawn from."""


class TrainResources(Settings):
    """Workers and their processes."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """How many; two numbers: as many as there are, between them."""
    gpus: float = Field(default=0, ge=0)
    """Of one worker."""
    cpus: PositiveInt = 1
    """Of one worker; its threads."""
    loaders: int = Field(default=1, ge=0)
    """Processes that read crops for one worker; 0: the worker reads."""
    passes: PositiveInt = 8
    """Parts of a batch, of like length, that go through the network one after the other; workers share them, so at
    least as many as workers. Part of the numbers: another value rounds differently."""
    cache_gib: float = Field(default=0.0, ge=0)
    """GiB of each node's disk on which tracks of a remote store are kept; 0: none."""
    cache_dir: str = "~/.cache/wealy-ray/tracks"
    """Where on each node: its fastest local disk."""
    max_failures: int = Field(default=3, ge=-1)
    """How often the group of workers is started again after one died; -1: always."""

    @field_validator("workers")
    @classmethod
    def _least_first(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(workers, int) and workers[0] > workers[1]:
            raise ValueError(f"the smaller of the two numbers comes first: [{workers[1]}, {workers[0]}]")
        return workers

    @property
    def most_workers(self) -> int:
        """How many there are at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def least_workers(self) -> int:
        """How many there must be."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]


class TrainRecipe(Settings):
    """One training: a manifest and a store in, a model directory out."""

    manifest: str
    """Parquet manifest (any URI); cliques and splits are taken from it."""
    store: str
    """Store of states."""
    out: str
    """Folder of the run (any URI that all workers reach): checkpoints, `model/`, `run.json`."""
    extractor_id: str | None = None
    """Which of the store's extractors; None: the only one."""
    index: PositiveInt | None = None
    """Which snapshot of the store; None: the latest at the first start, and the same ever after."""
    model: ModelSettings = TransformerSettings()
    loss: LossSettings = NTXentSettings()
    gather: Literal["all", "none"] = "all"
    """Negatives of all workers; `none`: of the own worker only, as the paper."""
    data: DataSettings = DataSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    validation: ValidationSettings = ValidationSettings()
    mining: MiningSettings | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    storage: StorageSettings = StorageSettings()
    resources: TrainResources = TrainResources()
    checkpoint_every_s: float = Field(default=300.0, gt=0)
    """At most so much work is lost with a worker: a checkpoint is written when the last one is older, and always with
    the best MAP."""
    lease_s: float = Field(default=120.0, gt=0)
    """After this long without a sign of life another driver may take over the run."""
    tracking: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Where curves go, beside `history.json`."""
    progress_every_s: float = Field(default=30.0, gt=0)
    """Distance of two progress lines in a job log."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        workers, most = self.resources.workers, self.resources.most_workers
        if self.gather == "all" and most > self.resources.passes:
            raise ValueError(
                f"{most} workers share resources.passes = {self.resources.passes}: some would have nothing to do"
            )
        if self.gather == "none" and not isinstance(workers, int):
            raise ValueError("with gather: none the number of workers is part of the loss: give one number")
        if self.data.train_split == self.data.validation_split:
            raise ValueError(f"train_split and validation_split are both '{self.data.train_split}'")
        return self
