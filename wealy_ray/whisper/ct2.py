"""Reading a CTranslate2 Whisper model (`model.bin`) as an openai-whisper checkpoint.

CTranslate2's layout (binary versions 5 and 6), little endian, established on real files::

    u32 binary_version | str spec_name | u32 revision | u32 n_variables
    n x ( str name | u8 rank | rank x u32 dim | u8 dtype | u32 n_bytes | bytes )
    u32 n_aliases | n x ( str alias | str target )
    str = u16 length (counting the trailing NUL) | bytes | NUL

It fuses query, key and value of an attention into one matrix, stores int8 weights with a scale per row, and
names the token embedding's second use (the output projection) as an alias.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch

DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}
"""CTranslate2's dtype ids; 5 (bfloat16) is refused."""


class CT2FormatError(ValueError):
    """The bytes are no CTranslate2 Whisper model, or a damaged one; `str(error)` says what is wrong."""


class _Reader:
    """Takes values off the front of a buffer."""

    def __init__(self, data: bytes) -> None:
        self.view = memoryview(data)
        self.position = 0

    def take(self, num_bytes: int) -> memoryview:
        end = self.position + num_bytes
        if end > len(self.view):
            raise CT2FormatError(f"it is truncated: {len(self.view)} bytes, but at least {end} are needed")
        taken = self.view[self.position : end]
        self.position = end
        return taken

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = bytes(self.take(self.number("H")))
        try:
            return raw.rstrip(b"\0").decode("utf-8")
        except UnicodeDecodeError as error:
            raise CT2FormatError("a name in it is no text") from error


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """Parse a `model.bin`.

    Args:
        data: The whole file.

    Returns:
        Name -> array (a view of `data`); aliases are resolved.

    Raises:
        CT2FormatError: On damage, another kind of model, or an unsupported dtype.
    """
    reader = _Reader(data)
    version = reader.number("I")
    if version not in (5, 6):
        raise CT2FormatError("it is no CTranslate2 model of binary version 5 or 6")
    spec = reader.string()
    if spec != "WhisperSpec":
        raise CT2FormatError(f"it is a CTranslate2 model of kind {spec!r}, not 'WhisperSpec'")
    reader.number("I")  # revision
    tensors: dict[str, np.ndarray] = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        shape = tuple(reader.number("I") for _ in range(reader.number("B")))
        code, num_bytes = reader.number("B"), reader.number("I")
        if code not in DTYPES:
            raise CT2FormatError(f"{name} has the unsupported dtype id {code}; use float16, float32 or int8")
        dtype = DTYPES[code]
        if num_bytes != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            raise CT2FormatError(f"{name} has {num_bytes} bytes, which do not fit {shape} of {dtype}")
        tensors[name] = np.frombuffer(reader.take(num_bytes), dtype=dtype).reshape(shape)
    for _ in range(reader.number("I")):
        alias, target = reader.string(), reader.string()
        if target not in tensors:
            raise CT2FormatError(f"the alias {alias} points to {target}, which is missing")
        tensors[alias] = tensors[target]
    if reader.position != len(reader.view):
        raise CT2FormatError(f"{len(reader.view) - reader.position} bytes are left over at its end")
    return tensors


def to_checkpoint(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Rename and split CTranslate2's tensors.

    Args:
        tensors: From `read_tensors`.

    Returns:
        `{"dims": ..., "model_state_dict": ...}` as openai-whisper saves it.

    Raises:
        CT2FormatError: When tensors are missing or do not fit Whisper's architecture.
    """
    try:
        return _Converter(tensors).convert()
    except KeyError as error:
        raise CT2FormatError(f"the tensor {error.args[0]} is missing") from error


class _Converter:
    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.state: dict[str, np.ndarray] = {}

    def convert(self) -> dict[str, Any]:
        embedding = self.tensors["decoder/embeddings/weight"]
        projection = self.tensors["decoder/projection/weight"]
        if projection is not embedding:
            raise CT2FormatError("its output projection is not tied to the token embedding")
        self._affine("encoder.conv1", "encoder/conv1")
        self._affine("encoder.conv2", "encoder/conv2")
        self.state["decoder.token_embedding.weight"] = self._get("decoder/embeddings/weight")
        for side, last_norm in (("encoder", "ln_post"), ("decoder", "ln")):
            self.state[f"{side}.positional_embedding"] = self._get(f"{side}/position_encodings/encodings")
            for index in range(self._depth(side)):
                self._block(f"{side}.blocks.{index}", f"{side}/layer_{index}", cross=side == "decoder")
            self._norm(f"{side}.{last_norm}", f"{side}/layer_norm")
        state = {name: torch.from_numpy(array.copy()) for name, array in self.state.items()}
        return {"dims": self._dims(), "model_state_dict": state}

    def _dims(self) -> dict[str, int]:
        audio_ctx, audio_state = self.state["encoder.positional_embedding"].shape
        text_ctx, text_state = self.state["decoder.positional_embedding"].shape
        return {
            "n_mels": self.state["encoder.conv1.weight"].shape[1],
            "n_vocab": self.state["decoder.token_embedding.weight"].shape[0],
            "n_audio_ctx": audio_ctx,
            "n_audio_state": audio_state,
            "n_audio_head": int(self.tensors["encoder/num_heads"]),
            "n_audio_layer": self._depth("encoder"),
            "n_text_ctx": text_ctx,
            "n_text_state": text_state,
            "n_text_head": int(self.tensors["decoder/num_heads"]),
            "n_text_layer": self._depth("decoder"),
        }

    def _depth(self, side: str) -> int:
        prefix = f"{side}/layer_"
        numbers = {name[len(prefix) :].split("/")[0] for name in self.tensors if name.startswith(prefix)}
        return len({number for number in numbers if number.isdigit()})

    def _get(self, name: str) -> np.ndarray:
        array = self.tensors[name]
        if array.dtype != np.int8:
            return array
        scale = self.tensors[name + "_scale"].astype(np.float32)
        return array.astype(np.float32) / scale.reshape(-1, *[1] * (array.ndim - 1))

    def _norm(self, target: str, source: str) -> None:
        self.state[target + ".weight"] = self._get(source + "/gamma")
        self.state[target + ".bias"] = self._get(source + "/beta")

    def _affine(self, target: str, source: str) -> None:
        self.state[target + ".weight"] = self._get(source + "/weight")
        self.state[target + ".bias"] = self._get(source + "/bias")

    def _fused(self, target: str, source: str, parts: tuple[str, ...]) -> None:
        weight, bias = self._get(source + "/weight"), self._get(source + "/bias")
        if len(weight) % len(parts) or len(bias) != len(weight):
            raise CT2FormatError(f"{source} does not hold {len(parts)} matrices")
        weights, biases = np.split(weight, len(parts)), np.split(bias, len(parts))
        for name, part_weight, part_bias in zip(parts, weights, biases, strict=True):
            self.state[f"{target}.{name}.weight"] = part_weight
            if name != "key":
                self.state[f"{target}.{name}.bias"] = part_bias
            elif np.any(part_bias):
                raise CT2FormatError(f"{source} has a key bias, which Whisper has not")

    def _block(self, target: str, source: str, *, cross: bool) -> None:
        self._norm(f"{target}.attn_ln", f"{source}/self_attention/layer_norm")
        self._fused(f"{target}.attn", f"{source}/self_attention/linear_0", ("query", "key", "value"))
        self._affine(f"{target}.attn.out", f"{source}/self_attention/linear_1")
        if cross:
            self._norm(f"{target}.cross_attn_ln", f"{source}/attention/layer_norm")
            self._affine(f"{target}.cross_attn.query", f"{source}/attention/linear_0")
            self._fused(f"{target}.cross_attn", f"{source}/attention/linear_1", ("key", "value"))
            self._affine(f"{target}.cross_attn.out", f"{source}/attention/linear_2")
        self._norm(f"{target}.mlp_ln", f"{source}/ffn/layer_norm")
        self._affine(f"{target}.mlp.0", f"{source}/ffn/linear_0")
        self._affine(f"{target}.mlp.2", f"{source}/ffn/linear_1")
