"""Every setting, validated once; one model per job; a run is one YAML recipe.

A recipe is a YAML file with the fields of `ExtractRecipe`. Unknown keys and wrong values are refused with
one sentence that names the key. Settings are frozen: nothing changes them after they were read.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from wealy_ray.errors import ConfigError

WINDOW_S = 30.0
"""Length of a Whisper window in seconds; fixed by the model."""


DECODER_MB = 48
"""What a common codec takes for itself, in MiB."""
DECODER_MB_PER_S = 2 * 4 * 16_000 / 2**20
"""MiB per second of audio in a decoder: float32 samples at 16 kHz, and their copy."""


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, defaults checked as well."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class StorageSettings(Settings):
    """How storage is reached. Credentials never stand here: they come from the environment or a profile."""

    s3_endpoint_url: str | None = None
    """Endpoint of an S3-compatible server; None: AWS, or the environment's AWS_ENDPOINT_URL."""
    s3_region: str | None = None
    """Region of the bucket; None: the environment's or the profile's."""
    retry_for_s: float = Field(default=300.0, ge=0)
    """How long a passing fault (network, 5xx) is retried with back-off before the run ends as resumable."""

    @field_validator("s3_endpoint_url")
    @classmethod
    def _no_credentials(cls, url: str | None) -> str | None:
        if url is not None and "@" in url:
            raise ValueError("credentials do not belong into an address; use the environment or a profile")
        return url


class AudioSettings(Settings):
    """From bytes to 16 kHz mono."""

    max_duration_s: PositiveFloat = 300.0
    """A track is cut here and decoding stops, however long the file is. Part of the extractor id."""
    decode_timeout_s: PositiveFloat = 120.0
    """A decoder that takes longer on one track is killed, and the track fails."""
    decode_memory_mb: PositiveInt = 2048
    """A decoder that asks for more memory (MiB) is stopped, and the track fails."""

    @model_validator(mode="after")
    def _memory_holds_the_samples(self) -> AudioSettings:
        least_mb = math.ceil(DECODER_MB + self.max_duration_s * DECODER_MB_PER_S)
        if self.decode_memory_mb < least_mb:
            raise ValueError(
                f"decode_memory_mb ({self.decode_memory_mb}) must be at least {least_mb} for max_duration_s = "
                f"{self.max_duration_s:g}"
            )
        return self


class FixedWindows(Settings):
    """The `fixed` window plan: independent 30 s windows. Part of the extractor id."""

    plan: Literal["fixed"] = "fixed"
    hop_s: float = Field(default=25.0, gt=0, le=WINDOW_S)
    """Distance of two window starts; 25 s leaves an overlap of 5 s."""


class ReferenceWindows(Settings):
    """The `reference` window plan: `whisper.transcribe`, by its names and with its defaults.

    A window begins where the last one's timestamps end, and takes its text as context. Part of the extractor id.
    """

    plan: Literal["reference"]
    condition_on_previous_text: bool = True
    temperatures: tuple[NonNegativeFloat, ...] = Field(default=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), min_length=1)
    """Tried in turn until an attempt is accepted; `[0.0]` turns fallback off."""
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    pad_to_s: PositiveFloat | None = None
    """Shorter tracks are padded with silence to this length; WEALY's authors used 300."""
    seed: int = 0
    """Of the draws at temperatures above 0."""


def _plan_of(windows: Any) -> str:
    return (
        str(windows.get("plan", "fixed")) if isinstance(windows, dict) else getattr(windows, "plan", "fixed")
    )


WindowSettings = Annotated[
    Annotated[FixedWindows, Tag("fixed")] | Annotated[ReferenceWindows, Tag("reference")],
    Discriminator(
        _plan_of,
        custom_error_type="unknown_plan",
        custom_error_message="the window plan must be 'fixed' or 'reference'",
    ),
]
"""One of the window plans; without `plan` it is `fixed`."""


class DecodeSettings(Settings):
    """What Whisper is asked for; part of the extractor id."""

    language: str | None = None
    """Whisper language code that is forced on every track; None: detected once per track."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """`translate` asks Whisper for English text."""
    timestamps: bool | None = None
    """Whether timestamp tokens are sampled; their states are stored then as well. None: in the window plan
    `reference`, which seeks by them, but not in `fixed`."""
    max_tokens: int = Field(default=224, ge=1, le=224)
    """At most so many sampled tokens per window."""
    initial_prompt: str | None = None
    """Text that Whisper is given as context: before every window of the plan `fixed`, before a track's first window
    in `reference`. WEALY's authors used "lyrics:"."""
    state_layer: str = "decoder.ln"
    """Whose output is stored: `decoder.ln`, the vector that gives the logits, or `decoder.blocks.K` (the last
    block's is the same before its LayerNorm)."""
    max_repeats: int | None = Field(default=None, ge=2)
    """Ends a window when it says one sequence this many times in a row; None lets it loop, like Whisper."""


class EngineSettings(Settings):
    """How the Whisper engine runs; changes speed, not results beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU where Ray gives the engine one."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """`auto`: float32 on a CPU, float16 on a GPU."""
    num_slots: PositiveInt | None = None
    """Windows that are decoded at the same time; None: 16 on a CPU, on a GPU as many as fit, 256 at most."""
    encoder_batch: PositiveInt | None = None
    """Windows per encoder pass; None: 1 on a CPU, 16 on a GPU."""
    num_threads: PositiveInt | None = None
    """CPU threads of one engine; None: the stage's `cpus`, rounded up."""


class ExtractResources(Settings):
    """What each stage of extraction asks Ray for. Requests of neighbouring stages differ, lest they fuse."""

    decode_cpus: PositiveFloat = 0.5
    """Logical CPUs of one decoding task."""
    engine_cpus: PositiveFloat = 1.0
    """Logical CPUs of one engine actor."""
    engine_gpus: float | None = Field(default=None, ge=0)
    """GPUs of one engine actor; None: 1 where the cluster has GPUs, else 0."""
    engine_min: PositiveInt = 1
    """Fewest engine actors."""
    engine_max: PositiveInt = 1
    """Most engine actors; the pool grows on a cluster that scales."""
    engine_initial: PositiveInt | None = None
    """Engine actors at the start; None: `engine_min`."""
    engine_restarts: int = Field(default=2, ge=0)
    """How often a dead engine actor is started again before its tracks come under suspicion."""
    tracks_per_block: PositiveInt = 16
    """Tracks that travel through the pipeline as one block; all of them run again when an engine dies."""
    tracks_per_shard: PositiveInt = 64
    """Tracks in one shard file."""
    writer_cpus: PositiveFloat = 0.25
    """Logical CPUs of one shard writer."""

    @model_validator(mode="after")
    def _pool_sizes(self) -> ExtractResources:
        if self.engine_max < self.engine_min:
            raise ValueError(f"engine_max ({self.engine_max}) is below engine_min ({self.engine_min})")
        initial = self.engine_initial
        if initial is not None and not self.engine_min <= initial <= self.engine_max:
            raise ValueError(f"engine_initial ({initial}) is not within engine_min and engine_max")
        cpus = (self.decode_cpus, self.engine_cpus, self.writer_cpus)
        if len({*cpus}) < len(cpus):
            raise ValueError(
                "decode_cpus, engine_cpus and writer_cpus must differ, else Ray fuses the stages"
            )
        return self


class ExtractRecipe(Settings):
    """One extraction: a manifest in, a store of decoder states out."""

    manifest: str
    """Parquet manifest (any URI), see `wealy manifest`."""
    store: str
    """Folder or bucket prefix of the store (any URI)."""
    model: str = "turbo"
    """An openai-whisper name, a `.pt` file or URI, a CTranslate2 folder, or `random-tiny` for trials."""
    storage: StorageSettings = StorageSettings()
    audio: AudioSettings = AudioSettings()
    windows: WindowSettings = FixedWindows()
    decode: DecodeSettings = DecodeSettings()
    engine: EngineSettings = EngineSettings()
    resources: ExtractResources = ExtractResources()
    publish_every_s: PositiveFloat = 120.0
    """An index is published this often while tracks are finished, and at the end."""
    progress_every_s: PositiveFloat = 30.0
    """Distance of two progress lines in a job log."""
    lease_s: PositiveFloat = 60.0
    """A driver waits this long for another one that seems to be alive, before it takes the store over."""
    suspect_attempts: PositiveInt = 2
    """A track that kills its engine this many times, alone, becomes a failed row."""
    max_failure_rate: float = Field(default=0.05, ge=0, le=1)
    """The job exits non-zero when a larger share of the manifest's tracks failed."""

    @property
    def timestamps(self) -> bool:
        """Whether timestamp tokens are sampled."""
        return self.windows.plan == "reference" if self.decode.timestamps is None else self.decode.timestamps


R = TypeVar("R", bound=Settings)


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> ExtractRecipe:
    """Reads and validates a recipe of extraction, see `load_settings`."""
    return load_settings(ExtractRecipe, path, overrides)


def load_settings(model: type[R], path: str | Path, overrides: dict[str, Any] | None = None) -> R:
    """Reads and validates a recipe.

    Args:
        model: The job's settings.
        path: A YAML file.
        overrides: Dotted keys to values that replace the file's (`{"engine.num_slots": 8}`).

    Raises:
        ConfigError: The file is missing, is no YAML mapping, or a key or value is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read the recipe {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"the recipe {path} is not a text file") from e
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"the recipe {path} is not valid YAML{where}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"the recipe {path} is not a mapping of settings")
    for key, value in (overrides or {}).items():
        _set_dotted(data, key, value)
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise ConfigError(f"recipe {path}: {_first_fault(model, e)}") from e


def parse_override(text: str) -> tuple[str, Any]:
    """Splits a command-line `key.subkey=value`; the value is read as YAML.

    Raises:
        ConfigError: There is no `=`, or the value is no YAML.
    """
    key, sep, value = text.partition("=")
    if not sep or not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", key):
        raise ConfigError(f"'{text}' is not an override of the form key.subkey=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise ConfigError(f"the value of '{text}' is not valid YAML") from e


def _set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        node = data.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {key}: '{parent}' is not a group of settings")
        data = node
    data[last] = value


def _first_fault(recipe: type[Settings], error: ValidationError) -> str:
    """One sentence for the first fault, with the valid keys where a key is unknown."""
    fault = error.errors(include_url=False)[0]
    model: Any = recipe
    keys: list[str] = []
    for part in fault["loc"]:
        choices = _choices(model)
        if part in choices:
            model = choices[part]  # the tag of a union is no key
            continue
        if isinstance(part, str) and get_origin(model) in (Union, UnionType):
            continue  # nor is what pydantic calls one of several types
        keys.append(str(part))
        inner = getattr(model, "model_fields", {}).get(part)
        model = _unless_none(inner.annotation) if inner is not None else model
    key = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{key}'; valid keys here are {', '.join(model.model_fields)}"
    if fault["type"] == "missing":
        return f"the key '{key}' is missing"
    message = fault["msg"].removeprefix("Value error, ")
    hides = "credentials" in message or isinstance(fault["input"], dict)
    shown = "" if hides else f" is {fault['input']!r}"
    where = f"'{key}'{shown}: " if key else ""
    return f"{where}{message[:1].lower()}{message[1:]}"


def _unless_none(annotation: Any) -> Any:
    """The type of a setting that is not left out."""
    parts = [part for part in get_args(annotation) if part is not NoneType]
    return parts[0] if len(parts) == 1 < len(get_args(annotation)) else annotation


def _choices(annotation: Any) -> dict[Any, Any]:
    """The settings of a tagged union by their tags, wherever in the annotation they stand."""
    found: dict[Any, Any] = {}
    for part in get_args(annotation):
        if isinstance(part, type) and issubclass(part, Settings):
            for name in ("plan", "kind"):
                if name in part.model_fields:
                    found |= dict.fromkeys(get_args(part.model_fields[name].annotation), part)
        found |= _choices(part)
    return found
