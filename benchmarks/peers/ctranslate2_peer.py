"""CTranslate2, the library under faster-whisper: text only, it gives no states."""

from __future__ import annotations

import json

import ctranslate2
import numpy as np
import torch
from ctranslate2 import StorageView
from torch import Tensor

from benchmarks.peers import Decoded, Setting
from wealy_ray.whisper.vocabulary import Vocabulary


class CTranslate2:
    """`ctranslate2.models.Whisper`, `batch` windows at a time, greedy.

    "Decoder" starts from the features of its own encoder, made outside the clock.

    Args:
        setting: What all contenders share.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        self.model = _load(setting)
        self.prompts = setting.start_sequences()
        num_initial, max_tokens = len(self.prompts[0]), setting.options.max_tokens
        # It samples min(max_length / 2, max_length - num_initial + 1) tokens, EOT included.
        self.max_length = max(2 * max_tokens, max_tokens + num_initial - 1)
        self.encoded = [self.model.encode(mels) for mels in self._batches(setting.mels)]

    def decoder(self) -> Decoded:
        """From encoder features."""
        return self._decode_all(self.encoded)

    def whole(self) -> Decoded:
        """From PCM."""
        return self._decode_all(self._batches(self.setting.log_mels()))

    def _batches(self, mels: list[Tensor]) -> list[StorageView]:
        batches = [torch.stack(mels[rows]).cpu().numpy() for rows in self.setting.batches()]
        device = self.setting.device.type
        return [
            StorageView.from_array(np.ascontiguousarray(batch)).to_device(_device(device))
            for batch in batches
        ]

    def _decode_all(self, batches: list[StorageView]) -> Decoded:
        options, vocabulary = self.setting.options, self.setting.vocabulary
        results: Decoded = []
        for rows, inputs in zip(self.setting.batches(), batches, strict=True):
            decoded = self.model.generate(
                inputs,
                self.prompts[rows],
                beam_size=1,
                max_length=self.max_length,
                suppress_tokens=vocabulary.suppressed(timestamps=options.timestamps),
            )
            results += [(_text(result.sequences_ids[0], vocabulary), None) for result in decoded]
        return results


def _device(name: str) -> ctranslate2.Device:
    return getattr(ctranslate2.Device, name)


def _text(tokens: list[int], vocabulary: Vocabulary) -> list[int]:
    return [token for token in tokens if token != vocabulary.eot]


def _load(setting: Setting) -> ctranslate2.models.Whisper:
    folder = setting.ct2_folder
    files = {name: (folder / name).read_bytes() for name in ("model.bin", "config.json")}
    files["vocabulary.json"] = json.dumps(_token_names(setting)).encode()
    on_gpu = setting.device.type == "cuda"
    return ctranslate2.models.Whisper(
        str(folder),
        device=setting.device.type,
        compute_type=str(setting.dtype).removeprefix("torch.") if on_gpu else "float32",
        intra_threads=setting.threads,
        files=files,
    )


def _token_names(setting: Setting) -> list[str]:
    """A vocabulary: it is loaded with the model, but only special tokens are looked up.

    The last text token is empty, as in Whisper's multilingual vocabulary: the library tells it by that.
    """
    tokenizer = setting.vocabulary.tokenizer
    names = [f"text {index}" for index in range(setting.model.dims.n_vocab)]
    for name, index in tokenizer.special_tokens.items():
        names[index] = name
    if setting.model.is_multilingual:
        names[tokenizer.eot - 1] = ""
    return names
