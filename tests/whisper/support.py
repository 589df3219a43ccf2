"""Helpers of the whisper tests: audio, stock references, tiny models, a CTranslate2 writer."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
import whisper
from whisper.model import ModelDimensions, Whisper

from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, WindowResult
from wealy_ray.whisper.backend import Backend, Copy, Lane
from wealy_ray.whisper.checkpoint import RANDOM_TINY_DIMS, random_whisper

SONGS = Path(__file__).parents[2] / "examples" / "songs" / "audio"
ENGLISH_TINY_DIMS = replace(RANDOM_TINY_DIMS, n_vocab=51864)


def pcm(path: Path) -> np.ndarray:
    """A file's samples, 16 kHz mono."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=whisper.audio.SAMPLE_RATE)
    chunks: list[np.ndarray] = []
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            chunks.extend(part.to_ndarray()[0] for part in resampler.resample(frame))
    return np.concatenate(chunks).astype(np.float32)


def first_window(path: Path) -> torch.Tensor:
    """Log-mel [80, 3000] of a file's first 30 s."""
    return whisper.log_mel_spectrogram(whisper.pad_or_trim(pcm(path)))


def noise(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Windows of noise of growing loudness, [80, 3000] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(80, 3000, generator=generator) * (0.2 + index / 4) for index in range(count)]


class _Later:
    """Passes when it is asked a second time, like an event of a busy device."""

    def __init__(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def synchronize(self) -> None:
        self.asked = 2


class _LateCopy(Copy):
    def __init__(self, tensors: Sequence[torch.Tensor]):
        super().__init__([tensor.clone() for tensor in tensors])
        self._event = _Later()

    def is_ready(self) -> bool:
        return self._event.query()


class GpuShaped(Backend):
    """The path of a GPU on the CPU: static steps that are replayed, several per look, results that come later."""

    is_static = True
    steps_per_read = 5
    batches_ahead = 2
    row_multiple = 1
    encoder_batch = 2

    def __init__(self) -> None:
        self.captured: list[Lane] = []

    def capture(self, work: Callable[[], None], lane: Lane) -> Callable[[], None]:
        work()
        self.captured.append(lane)
        return work

    def mark(self) -> _Later:  # type: ignore[override]
        return _Later()

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Copy:
        return _LateCopy(tensors)


@dataclass(frozen=True)
class Reference:
    """What stock openai-whisper gives for one window."""

    result: whisper.DecodingResult
    states: np.ndarray
    language_probability: float


def stock(model: Whisper, window: torch.Tensor, *, timestamps: bool, max_tokens: int) -> Reference:
    """`whisper.decode` of one window (mel or features), with a hook on the decoder's final LayerNorm."""
    with torch.no_grad():
        features = model.encoder(window[None])[0] if window.shape[0] == model.dims.n_mels else window
    language, probability = "en", 1.0
    if model.is_multilingual:
        _, probabilities = model.detect_language(features)
        language, probability = max(probabilities.items(), key=lambda item: item[1])
    states: list[np.ndarray] = []
    hook = model.decoder.ln.register_forward_hook(lambda _module, _args, out: states.append(out[0].numpy()))
    options = whisper.DecodingOptions(
        fp16=False, language=language, without_timestamps=not timestamps, sample_len=max_tokens
    )
    try:
        result = whisper.decode(model, features, options)
    finally:
        hook.remove()
    return Reference(result, np.concatenate(states), probability)


def decode_all(
    model: Whisper,
    windows: Iterable[torch.Tensor],
    num_slots: int,
    options: DecodeOptions,
    backend: Backend | None = None,
) -> list[WindowResult]:
    """All windows through one engine, submitted at once."""
    on_cpu = EngineOptions(device="cpu", num_slots=num_slots)
    with Engine(model, on_cpu, options, backend=backend) as engine:
        futures = [engine.submit(window) for window in windows]
        return [future.result(timeout=600) for future in futures]


def relative_l2(states: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Per row: norm of the difference / norm of the reference."""
    return np.linalg.norm(states - reference, axis=1) / np.linalg.norm(reference, axis=1)


def assert_same_bits(one: WindowResult, other: WindowResult) -> None:
    """Everything in two results is equal to the last bit."""
    for name in ("tokens", "language", "language_probability", "no_speech_prob", "avg_logprob"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("states", "token_ids", "kinds"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def tiny_model(dims: ModelDimensions = RANDOM_TINY_DIMS) -> Whisper:
    return random_whisper(dims).requires_grad_(False)


def tiny_model_that_ends(windows: list[torch.Tensor]) -> Whisper:
    """A random model whose windows end at different lengths.

    EOT takes the place of a token that this model samples at different times, without timestamps.
    """
    model = tiny_model()
    results = decode_all(model, windows, 4, DecodeOptions(timestamps=False, max_tokens=60))
    sampled = {token for result in results for token in result.tokens}

    def num_lengths(token: int) -> int:
        return len({result.tokens.index(token) if token in result.tokens else -1 for result in results})

    best = max(sorted(sampled), key=num_lengths)
    embedding = model.decoder.token_embedding.weight
    eot = whisper.tokenizer.get_tokenizer(True).eot
    with torch.no_grad():
        embedding[eot] = embedding[best] * 1.01
    return model


def write_ct2(model: Whisper, path: Path, *, spec: str = "WhisperSpec", int8: bool = False) -> None:
    """Write a model in CTranslate2's layout: the inverse of the reader, for tests only."""
    tensors = _ct2_tensors(model)
    if int8:
        for name in [name for name, array in tensors.items() if array.ndim == 2 and "linear" in name]:
            scale = 127 / np.abs(tensors[name]).max(axis=1)
            tensors[name + "_scale"] = scale.astype(np.float32)
            tensors[name] = np.round(tensors[name] * scale[:, None]).astype(np.int8)
    codes = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text(spec) + struct.pack("<II", 3, len(tensors))
    for name, array in tensors.items():
        data += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", codes[array.dtype.name], array.nbytes) + array.tobytes()
    data += struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    path.write_bytes(data)


def _ct2_tensors(model: Whisper) -> dict[str, np.ndarray]:
    state = {name: tensor.numpy().astype(np.float32) for name, tensor in model.state_dict().items()}
    tensors: dict[str, np.ndarray] = {}

    def norm(target: str, source: str) -> None:
        tensors[target + "/gamma"], tensors[target + "/beta"] = (
            state[source + ".weight"],
            state[source + ".bias"],
        )

    def affine(target: str, source: str, parts: tuple[str, ...] = ("",)) -> None:
        names = [source + ("." + part if part else "") for part in parts]
        weights = [state[name + ".weight"] for name in names]
        zeros = np.zeros(len(weights[0]), np.float32)
        tensors[target + "/weight"] = np.concatenate(weights)
        tensors[target + "/bias"] = np.concatenate([state.get(name + ".bias", zeros) for name in names])

    for side, last in (("encoder", "ln_post"), ("decoder", "ln")):
        heads = model.dims.n_audio_head if side == "encoder" else model.dims.n_text_head
        tensors[f"{side}/num_heads"] = np.array(heads, np.int16)
        tensors[f"{side}/position_encodings/encodings"] = state[f"{side}.positional_embedding"]
        norm(f"{side}/layer_norm", f"{side}.{last}")
        depth = model.dims.n_audio_layer if side == "encoder" else model.dims.n_text_layer
        for index in range(depth):
            layer, block = f"{side}/layer_{index}", f"{side}.blocks.{index}"
            norm(f"{layer}/self_attention/layer_norm", f"{block}.attn_ln")
            affine(f"{layer}/self_attention/linear_0", f"{block}.attn", ("query", "key", "value"))
            affine(f"{layer}/self_attention/linear_1", f"{block}.attn.out")
            if side == "decoder":
                norm(f"{layer}/attention/layer_norm", f"{block}.cross_attn_ln")
                affine(f"{layer}/attention/linear_0", f"{block}.cross_attn.query")
                affine(f"{layer}/attention/linear_1", f"{block}.cross_attn", ("key", "value"))
                affine(f"{layer}/attention/linear_2", f"{block}.cross_attn.out")
            norm(f"{layer}/ffn/layer_norm", f"{block}.mlp_ln")
            affine(f"{layer}/ffn/linear_0", f"{block}.mlp.0")
            affine(f"{layer}/ffn/linear_1", f"{block}.mlp.2")
    affine("encoder/conv1", "encoder.conv1")
    affine("encoder/conv2", "encoder.conv2")
    tensors["decoder/embeddings/weight"] = state["decoder.token_embedding.weight"]
    return tensors
