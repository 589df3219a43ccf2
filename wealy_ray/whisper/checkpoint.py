"""Loading Whisper weights from wherever they are, as a float32 openai-whisper model with a digest.

Every fault of the weights is a `ModelError`: one sentence that names the source and what to do.
"""

from __future__ import annotations

import hashlib
import io
import os
import urllib.error
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
import whisper
from whisper.model import ModelDimensions, Whisper

from wealy_ray.errors import ModelError
from wealy_ray.whisper.ct2 import CT2FormatError, read_tensors, to_checkpoint

RANDOM_TINY = "random-tiny"
VOCABULARY_SIZES = (51864, 51865, 51866)  # English-only, multilingual, large-v3 and turbo


@dataclass(frozen=True)
class LoadedModel:
    """A Whisper model in float32 and eval mode, and what identifies it."""

    model: Whisper
    digest: str
    """SHA-256 over the weights, equal for the same weights in another container; see `weights_digest`."""
    source: str


def load_whisper(
    source: str, *, read_bytes: Callable[[str], bytes] | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load Whisper weights.

    Args:
        source: One of: a name known to openai-whisper (`turbo`, `base`; downloaded once per node), a path or
            URI of an openai-whisper `.pt` file, a local CTranslate2 Whisper folder (`model.bin`), or
            `random-tiny`: our own tiny random multilingual model for scale and chaos runs.
        read_bytes: Reads a URI (`scheme://...`).
        device: Where the parameters are put. The engine moves and casts what it needs by itself.

    Returns:
        The model, its digest and `source`.

    Raises:
        ModelError: When the weights are missing, damaged, foreign or cannot be downloaded.
    """
    if source == RANDOM_TINY:
        model = random_whisper(RANDOM_TINY_DIMS)
    elif source in whisper.available_models():
        model = _download(source)
    elif "://" in source:
        model = _model_of(source, _read_checkpoint(source, _read_uri(source, read_bytes)))
    elif Path(source).is_dir():
        model = _model_of(source, _read_ct2_folder(source))
    elif Path(source).is_file():
        model = _model_of(source, _read_checkpoint(source, _read_file(Path(source))))
    else:
        names = ", ".join([*whisper.available_models(), RANDOM_TINY])
        raise ModelError(
            f"{source}: no such file or folder, nor the name of a Whisper model; valid names are {names}"
        )
    model.eval().requires_grad_(False)
    return LoadedModel(model.to(device), weights_digest(model.state_dict()), source)


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the sorted (name, shape, float32 bytes) of a state dict, as hex."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{name} {list(array.shape)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


RANDOM_TINY_DIMS = ModelDimensions(
    n_mels=80,
    n_audio_ctx=1500,
    n_audio_state=64,
    n_audio_head=2,
    n_audio_layer=2,
    n_vocab=51865,
    n_text_ctx=448,
    n_text_state=64,
    n_text_head=2,
    n_text_layer=2,
)


def random_whisper(dims: ModelDimensions, seed: int = 0) -> Whisper:
    """A Whisper model of random weights, a function of `dims` and `seed` alone.

    It decodes noise: rarely an EOT, so windows run to `max_tokens`.
    """
    model = Whisper(dims).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                # A strong position and a weak embedding: otherwise it would repeat the token it was fed.
                gain = {"decoder.positional_embedding": 4.0, "decoder.token_embedding.weight": 0.3}
                scale = gain.get(name, 1.0) * (2.0 / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def _download(name: str) -> Whisper:
    """`whisper.load_model` behind a lock, so that the processes of a node download a model once."""
    cache = Path(os.getenv("XDG_CACHE_HOME", Path.home() / ".cache")) / "whisper"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{name}.lock"):
            return whisper.load_model(name, device="cpu", download_root=str(cache))
    except urllib.error.URLError as error:
        raise ModelError(
            f"{name}: the weights cannot be downloaded ({error.reason}); give the path or URI of a .pt file "
            "or a CTranslate2 folder instead"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{name}: the weights cannot be kept in {cache} ({error})") from error


def _read_uri(source: str, read_bytes: Callable[[str], bytes] | None) -> bytes:
    from wealy_ray.storage import ObjectMissingError  # loads pydantic, which the engine can do without

    if read_bytes is None:
        raise ModelError(f"{source}: URIs cannot be read here; give the path of a local file")
    try:
        return read_bytes(source)
    except (FileNotFoundError, ObjectMissingError) as error:
        raise ModelError(f"{source}: there is no such object; check the URI") from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the file cannot be read ({error.strerror})") from error


def _read_checkpoint(source: str, data: bytes) -> dict[str, Any]:
    """The content of a `.pt` file; only tensors and plain containers are unpickled."""
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make the unpickler raise anything, even IndexError
        raise ModelError(
            f"{source}: this is no torch checkpoint, or a damaged one ({len(data)} bytes); fetch it again"
        ) from error
    if not isinstance(checkpoint, dict) or not {"dims", "model_state_dict"} <= checkpoint.keys():
        raise ModelError(
            f"{source}: this torch checkpoint is not openai-whisper's (no 'dims' and 'model_state_dict'); "
            "convert it, or give the name of a Whisper model"
        )
    return checkpoint


def _read_ct2_folder(source: str) -> dict[str, Any]:
    path = Path(source) / "model.bin"
    if not path.is_file():
        raise ModelError(f"{source}: this folder holds no model.bin; give a CTranslate2 Whisper folder")
    try:
        return to_checkpoint(read_tensors(_read_file(path)))
    except CT2FormatError as error:
        raise ModelError(f"{path}: {error}; fetch it again, or convert a Whisper model anew") from error


def _model_of(source: str, checkpoint: dict[str, Any]) -> Whisper:
    """Build the model a checkpoint describes."""
    foreign = f"{source}: these are not the weights of a Whisper model"
    try:
        dims = ModelDimensions(**checkpoint["dims"])
    except TypeError as error:
        raise ModelError(f"{foreign} ('dims' has other fields); fetch it again") from error
    sizes = asdict(dims)
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise ModelError(f"{foreign} ('dims' is {sizes}); fetch it again")
    if dims.n_vocab not in VOCABULARY_SIZES:
        raise ModelError(f"{foreign} this program knows (a vocabulary of {dims.n_vocab}); use another one")
    try:
        model = Whisper(dims)
        model.load_state_dict(checkpoint["model_state_dict"])
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ModelError(f"{foreign} ({_first_line(error)}); fetch it again") from error
    return model


def _first_line(error: Exception) -> str:
    """The most telling line of torch's list of missing, unexpected and misshapen tensors, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__)[:160]
