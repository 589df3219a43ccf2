"""The contenders of `benchmarks/engine.py`: ours and its peers, all on the same windows.

A contender is made once, outside the clock, from a `Setting`; then `decoder` and `whole` are timed, round by
round. A library that only one contender needs is imported where that contender is made.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import whisper
from torch import Tensor
from whisper.model import Whisper

from wealy_ray.whisper import DecodeOptions
from wealy_ray.whisper.vocabulary import Vocabulary

Decoded = list[tuple[list[int], np.ndarray | None]]
"""Per window: sampled tokens without EOT, and states [n, d], None for a contender that has none."""


@dataclass(frozen=True)
class Setting:
    """What all contenders share. Nobody writes to it."""

    model: Whisper
    """float32, on `device`."""
    vocabulary: Vocabulary
    options: DecodeOptions
    device: torch.device
    dtype: torch.dtype
    batch: int
    threads: int
    ct2_folder: Path | None
    pcm: list[np.ndarray]
    """Windows of 30 s, 16 kHz."""
    languages: list[str]
    """Code per window, forced on every contender that can."""
    mels: list[Tensor]
    """[n_mels, 3000] float32, on `device`."""
    features: list[Tensor]
    """[1500, d] in `dtype`, on `device`."""

    def log_mels(self) -> list[Tensor]:
        """Log-mel from PCM, as in `mels`: what the part "whole" begins with."""
        return log_mels(self.pcm, self.model)

    def start_sequences(self) -> list[list[int]]:
        """Each window's initial tokens."""
        options = self.options
        return [
            self.vocabulary.start_sequence(language, task=options.task, timestamps=options.timestamps)
            for language in self.languages
        ]

    def batches(self) -> list[slice]:
        """The windows, `batch` at a time."""
        return [slice(start, start + self.batch) for start in range(0, len(self.pcm), self.batch)]


class Contender(Protocol):
    """One way to decode all of a setting's windows."""

    def decoder(self) -> Decoded:
        """From encoder features."""

    def whole(self) -> Decoded:
        """From PCM: log-mel, encoder and decoder."""


def log_mels(pcm: list[np.ndarray], model: Whisper) -> list[Tensor]:
    return [whisper.log_mel_spectrogram(window, model.dims.n_mels, device=model.device) for window in pcm]


def trim(vocabulary: Vocabulary, sampled: list[int], states: np.ndarray, num_initial: int) -> tuple:
    """Cut a row of a batch where it ends.

    Args:
        vocabulary: Token ids.
        sampled: The row's sampled tokens, from EOT on padded in any way.
        states: The row's states, from its end on those of padding, [n, d].
        num_initial: The row's initial tokens.

    Returns:
        Tokens without EOT, and their states: one for each token that was fed.
    """
    tokens = sampled[: sampled.index(vocabulary.eot)] if vocabulary.eot in sampled else sampled
    return tokens, states[: num_initial + len(tokens)]


def _stock(one_by_one: bool, setting: Setting) -> Contender:
    from benchmarks.peers.stock import Stock

    return Stock(setting, batch=1 if one_by_one else setting.batch)


def _hugging_face(direct: bool, setting: Setting) -> Contender:
    from benchmarks.peers.hugging_face import HuggingFace

    return HuggingFace(setting, direct=direct)


def _ctranslate2(setting: Setting) -> Contender:
    from benchmarks.peers.ctranslate2_peer import CTranslate2

    return CTranslate2(setting)


@dataclass(frozen=True)
class Peer:
    """A contender that is not ours."""

    package: str
    make: Callable[[Setting], Contender]
    needs_ct2_folder: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether its library can be imported."""
        return importlib.util.find_spec(self.package) is not None


PEERS = {
    "stock_one_by_one": Peer("whisper", partial(_stock, True)),
    "stock_batched": Peer("whisper", partial(_stock, False)),
    "hf_batched": Peer("transformers", partial(_hugging_face, False)),
    "hf_direct": Peer("transformers", partial(_hugging_face, True)),
    "ctranslate2": Peer("ctranslate2", _ctranslate2, needs_ct2_folder=True),
}


def choose(names: str | None, *, has_ct2_folder: bool) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers of a run.

    Args:
        names: Comma list of peers, or of the words they begin with (`stock`, `hf`); None takes all.
        has_ct2_folder: Whether the weights are there for CTranslate2.

    Returns:
        The peers by name, and why the others of those asked for are left out.
    """
    left_out: dict[str, str] = {}
    chosen = {}
    for name in _named(names):
        peer = PEERS[name]
        if not peer.is_installed:
            if names is not None:
                raise SystemExit(
                    f"error: {name} needs {peer.package}, which is not installed; run: pip install -e '.[bench]'"
                )
            left_out[name] = f"{peer.package} is not installed"
        elif peer.needs_ct2_folder and not has_ct2_folder:
            left_out[name] = "these weights are not at hand as a CTranslate2 folder"
        else:
            chosen[name] = peer
    return chosen, left_out


def _named(names: str | None) -> list[str]:
    if names is None:
        return list(PEERS)
    words = [word.strip() for word in names.split(",")]
    for word in words:
        if not any(_is_meant(word, name) for name in PEERS):
            raise SystemExit(f"error: no peer is called {word!r}; valid are {', '.join(PEERS)}, stock and hf")
    return [name for name in PEERS if any(_is_meant(word, name) for word in words)]


def _is_meant(word: str, name: str) -> bool:
    return name == word or name.startswith(f"{word}_")
