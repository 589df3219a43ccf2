"""What the contenders are given: weights, and windows of audio."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import whisper
from whisper.model import ModelDimensions, Whisper

from wealy_ray.whisper import load_whisper
from wealy_ray.whisper.checkpoint import random_whisper
from wealy_ray.whisper.packaged import assemble_base
from wealy_ray.whisper.vocabulary import Vocabulary

REPOSITORY = Path(__file__).parents[2]
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus"}
WINDOW_SAMPLES = whisper.audio.N_SAMPLES  # 30 s of 16 kHz
WINDOW_S = 30.0


def _dims(
    *, mels: int, vocab: int, width: int, heads: int, audio_layers: int, text_layers: int
) -> ModelDimensions:
    return ModelDimensions(
        n_mels=mels,
        n_audio_ctx=1500,
        n_audio_state=width,
        n_audio_head=heads,
        n_audio_layer=audio_layers,
        n_vocab=vocab,
        n_text_ctx=448,
        n_text_state=width,
        n_text_head=heads,
        n_text_layer=text_layers,
    )


SHAPES = {
    "tiny": _dims(mels=80, vocab=51865, width=384, heads=6, audio_layers=4, text_layers=4),
    "base": _dims(mels=80, vocab=51865, width=512, heads=8, audio_layers=6, text_layers=6),
    "small": _dims(mels=80, vocab=51865, width=768, heads=12, audio_layers=12, text_layers=12),
    "medium": _dims(mels=80, vocab=51865, width=1024, heads=16, audio_layers=24, text_layers=24),
    "large-v3": _dims(mels=128, vocab=51866, width=1280, heads=20, audio_layers=32, text_layers=32),
    "turbo": _dims(mels=128, vocab=51866, width=1280, heads=20, audio_layers=32, text_layers=4),
}
"""Dimensions of OpenAI's multilingual models."""


@dataclass(frozen=True)
class Weights:
    """A model, and where it is from."""

    model: Whisper
    digest: str
    ct2_folder: Path | None
    """The same weights for CTranslate2; None where there are none."""
    are_random: bool


def load(source: str | None, shape: str) -> Weights:
    """Load or make the weights.

    Args:
        source: `random`, what `load_whisper` takes, or None for the packaged Whisper base.
        shape: A key of `SHAPES`; only random weights need it.

    Returns:
        The weights, on the CPU in float32.
    """
    if source == "random":
        return Weights(endless_whisper(SHAPES[shape]), f"random {shape}", None, are_random=True)
    source = source or str(assemble_base(REPOSITORY / ".cache" / "whisper-base"))
    loaded = load_whisper(source)
    folder = Path(source) if Path(source).is_dir() else None
    return Weights(loaded.model, loaded.digest, folder, are_random=False)


def endless_whisper(dims: ModelDimensions) -> Whisper:
    """Random weights that never end a window: every contender makes the same number of steps.

    The embedding of EOT, which is also its row of the output projection, is zero: its logit is 0, below the
    largest of the other 50,000.
    """
    model = random_whisper(dims)
    with torch.no_grad():
        model.decoder.token_embedding.weight[Vocabulary.of(model).eot] = 0
    return model.requires_grad_(False)


def pcm_windows(songs: Path | None, count: int) -> list[np.ndarray]:
    """Up to `count` windows of 30 s: of the audio files below `songs`, in path order, or else of noise."""
    if songs is None:
        generator = np.random.default_rng(0)
        return [0.1 * generator.standard_normal(WINDOW_SAMPLES, dtype=np.float32) for _ in range(count)]
    windows: list[np.ndarray] = []
    for path in audio_files(songs):
        samples = read_audio(path)
        starts = range(0, len(samples), WINDOW_SAMPLES)
        windows += [whisper.pad_or_trim(samples[start : start + WINDOW_SAMPLES]) for start in starts]
        if len(windows) >= count:
            break
    return windows[:count]


def audio_files(songs: Path) -> list[Path]:
    paths = sorted(path for path in songs.rglob("*") if path.suffix in AUDIO_SUFFIXES)
    if not paths:
        raise SystemExit(f"error: no audio files below {songs}")
    return paths


def read_audio(path: Path) -> np.ndarray:
    """A file's samples: float32, 16 kHz, mono."""
    import av  # not on every GPU machine

    resampler = av.AudioResampler(format="flt", layout="mono", rate=whisper.audio.SAMPLE_RATE)
    with av.open(str(path)) as container:
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])
