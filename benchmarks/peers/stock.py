"""openai-whisper: `whisper.decode` with a hook on the decoder's final LayerNorm."""

from __future__ import annotations

import torch
import whisper
from torch import Tensor

from benchmarks.peers import Decoded, Setting, trim


class Stock:
    """The model as `whisper.load_model` gives it: float32 weights, cast on every call in half precision.

    A batch of one language is given it, like ours; a batch of several can only detect them, in a pass of its
    own. There is no bfloat16 in `whisper.decode`: then it computes in float16 (on the CPU in float32).

    Args:
        setting: What all contenders share.
        batch: Windows per call.
    """

    def __init__(self, setting: Setting, batch: int):
        self.setting, self.batch = setting, batch
        half = setting.device.type == "cuda" and setting.dtype != torch.float32
        self.dtype = torch.float16 if half or setting.dtype == torch.float16 else torch.float32
        self.features = [features.to(self.dtype) for features in setting.features]

    def decoder(self) -> Decoded:
        """From encoder features."""
        return self._decode_all(self.features)

    def whole(self) -> Decoded:
        """From PCM."""
        return self._decode_all(self.setting.log_mels())

    def _decode_all(self, inputs: list[Tensor]) -> Decoded:
        results: Decoded = []
        for start in range(0, len(inputs), self.batch):
            languages = set(self.setting.languages[start : start + self.batch])
            language = languages.pop() if len(languages) == 1 else None
            results += self._decode(torch.stack(inputs[start : start + self.batch]), language)
        return results

    def _decode(self, inputs: Tensor, language: str | None) -> Decoded:
        """Decode a batch of log-mel windows or features; the former are encoded in one batch too."""
        model, options = self.setting.model, self.setting.options
        passes: list[Tensor] = []
        hook = model.decoder.ln.register_forward_hook(lambda _module, _args, out: passes.append(out))
        decoding = whisper.DecodingOptions(
            fp16=self.dtype == torch.float16,
            language=language,
            without_timestamps=not options.timestamps,
            sample_len=options.max_tokens,
        )
        try:
            decoded = whisper.decode(model, inputs, decoding)
        finally:
            hook.remove()
        passes = passes[1:] if language is None else passes  # the detection's own pass
        states = torch.cat(passes, dim=1).cpu().numpy()
        rows = zip(decoded, states, strict=True)
        return [trim(self.setting.vocabulary, result.tokens, row, passes[0].shape[1]) for result, row in rows]
