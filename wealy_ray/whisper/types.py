"""What goes into the engine and what comes out: options, one result per window, counters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from wealy_ray.errors import ConfigError


class Kind(IntEnum):
    """What a state predicts, or, for the leading positions, the role of the token that was fed."""

    PROMPT = 0
    """The fed token is context before the start of transcript."""
    SOT = 1
    """The fed token belongs to the start sequence: start of transcript, language, task, no-timestamps."""
    TEXT = 2
    """The state predicts a text token (also the rare special token that the rules let through)."""
    TIMESTAMP = 3
    """The state predicts a timestamp token."""
    EOT = 4
    """The state predicts the end of the window; that token itself is never fed."""


@dataclass(frozen=True)
class EngineOptions:
    """Where and in which shapes the engine computes. Nothing here changes a token.

    Raises:
        ConfigError: On an unknown device or dtype, or a count below one.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if torch sees one."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """`auto` is float32 on the CPU and float16 on a GPU. Half precision changes some tokens."""
    num_slots: int | None = None
    """Windows that decode at the same time; the decoder step always has this shape. By default 16 on the CPU, and
    on a GPU as many as fit into its free memory, 256 at most."""
    encoder_batch: int | None = None
    """Windows per encoder call, padded up to this count; by default 1 on the CPU and 16 on a GPU."""

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}; valid are 'auto', 'cpu' and 'cuda'")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError(
                f"dtype is {self.dtype!r}; valid are 'auto', 'float32', 'float16' and 'bfloat16'"
            )
        if self.num_slots is not None and self.num_slots < 1:
            raise ConfigError(f"num_slots is {self.num_slots}; it must be at least 1")
        if self.encoder_batch is not None and self.encoder_batch < 1:
            raise ConfigError(f"encoder_batch is {self.encoder_batch}; it must be at least 1")


@dataclass(frozen=True)
class DecodeOptions:
    """What is decoded: these settings change tokens, so they belong to the extractor's identity.

    Raises:
        ConfigError: On an unknown task or a count below one.
    """

    language: str | None = None
    """Language code (`en`) that is forced on every window; None detects it."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """`translate` asks the model for English text."""
    timestamps: bool = True
    """Sample timestamp tokens under whisper's rules; False starts windows with `<|notimestamps|>`."""
    max_tokens: int = 224
    """Sampled tokens per window at most, EOT included; whisper's own limit is half of its text context."""
    initial_prompt: str | None = None
    """Text that is put before a window as its context: in the `fixed` plan before every window, in the
    `reference` plan before a track's first one."""
    state_layer: str = "decoder.ln"
    """Whose output is a state, named as in openai-whisper: `decoder.ln` is the vector that gives the logits,
    `decoder.blocks.K` the K-th block's output (the last block's is the same before its LayerNorm)."""
    max_repeats: int | None = None
    """Ends a window when its last tokens are one sequence (of at most 32 tokens) this many times in a row; None
    lets it loop, like whisper."""

    def __post_init__(self) -> None:
        if self.task not in ("transcribe", "translate"):
            raise ConfigError(f"task is {self.task!r}; valid are 'transcribe' and 'translate'")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.max_repeats is not None and self.max_repeats < 2:
            raise ConfigError(f"max_repeats is {self.max_repeats}; it must be at least 2")

    def state_block(self, num_blocks: int) -> int | None:
        """Index of the block whose output is a state; None: the final LayerNorm's.

        Args:
            num_blocks: Blocks of the model's decoder.

        Raises:
            ConfigError: `state_layer` names no layer of such a decoder.
        """
        if self.state_layer == "decoder.ln":
            return None
        match = re.fullmatch(r"decoder\.blocks\.(\d+)", self.state_layer)
        if match is None or int(match[1]) >= num_blocks:
            raise ConfigError(
                f"state_layer is {self.state_layer!r}; this model has 'decoder.ln' and 'decoder.blocks.0' to "
                f"'decoder.blocks.{num_blocks - 1}'"
            )
        return int(match[1])


@dataclass(frozen=True)
class Language:
    """A window's language and the probability that the model gives it among all languages."""

    code: str
    probability: float


@dataclass(frozen=True, eq=False)
class WindowResult:
    """One decoded window of 30 s.

    With L0 initial tokens and S sampled ones (EOT included) there are n = L0 + S - 1 states: the last
    sampled token is never fed. A window cut by `max_tokens` has no EOT.
    """

    tokens: list[int]
    """Sampled token ids without EOT, as `whisper.decode` returns them."""
    text: str
    language: str
    """Detected or forced; `en` on English-only models."""
    language_probability: float
    """Of `language` among all languages, read at the start of transcript; 1.0 on English-only models."""
    no_speech_prob: float
    avg_logprob: float
    """Sum of the sampled tokens' log-probabilities / (number without EOT + 1): whisper's formula."""
    compression_ratio: float
    temperature: float
    states: np.ndarray
    """Output of `state_layer`, [n, d]; float32, or float16 where the engine computes so."""
    token_ids: np.ndarray
    """int32 [n]: the token that each state predicts; for the leading L0 - 1 the token that was fed."""
    kinds: np.ndarray
    """int8 [n]: a `Kind` for each state."""
    ended: Literal["eot", "max_tokens", "repetition"]
    """What ended the window; `repetition`: the guard `max_repeats`."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made."""

    windows: int = 0
    """Windows finished."""
    tokens: int = 0
    """Tokens sampled, EOT included."""
    steps: int = 0
    """Decoder steps run."""
    slot_steps: int = 0
    """Slots computed over all steps, live or not."""
    live_slot_steps: int = 0
    """Slots that fed a token of a window, over all steps."""
    repetitions: int = 0
    """Windows that the repetition guard ended."""
    backoffs: int = 0
    """Times that memory ran out and the engine went on with fewer slots."""
    encoder_s: float = 0.0
    """Seconds in the encoder. On a GPU the host's share only: the device runs behind."""
    decoder_s: float = 0.0
    """Seconds in filling slots, steps and reading results."""

    @property
    def utilisation(self) -> float:
        """Share of slot-steps that fed a token of a window, 0 to 1."""
        return self.live_slot_steps / self.slot_steps if self.slot_steps else 0.0
