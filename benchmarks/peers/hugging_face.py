"""Hugging Face transformers: `WhisperForConditionalGeneration` on the same weights, without a model hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.peers import Decoded, Setting, trim
from benchmarks.peers.hf_checkpoint import hugging_face_model


class HuggingFace:
    """`generate` with the decoder's hidden states, `batch` windows at a time, greedy.

    Args:
        setting: What all contenders share.
        direct: False calls Whisper's own `generate`, as its documentation has it. That takes all it returns
            (states, caches) apart by window, over the CPU, and puts it together again; True calls the
            `generate` it is built on, with the same rules, and is spared that.
    """

    def __init__(self, setting: Setting, *, direct: bool):
        self.setting, self.direct = setting, direct
        model = hugging_face_model(setting.model)
        self.model = model.to(setting.device, setting.dtype).eval()
        self.initial = torch.tensor(setting.start_sequences(), device=setting.device)

    def decoder(self) -> Decoded:
        """From encoder features."""
        features = self.setting.features
        return self._decode_all(
            [
                {"encoder_outputs": BaseModelOutput(torch.stack(features[rows]))}
                for rows in self.setting.batches()
            ]
        )

    def whole(self) -> Decoded:
        """From PCM."""
        mels = [mel.to(self.setting.dtype) for mel in self.setting.log_mels()]
        return self._decode_all(
            [{"input_features": torch.stack(mels[rows])} for rows in self.setting.batches()]
        )

    def _decode_all(self, batches: list[dict[str, Any]]) -> Decoded:
        decode = self._decode_direct if self.direct else self._decode
        results: Decoded = []
        for rows, inputs in zip(self.setting.batches(), batches, strict=True):
            with torch.no_grad():
                output = decode(rows, inputs)
            results += self._rows(output, self.initial.shape[1])
        return results

    def _decode(self, rows: slice, inputs: dict[str, Any]) -> Any:
        is_multilingual = bool(self.setting.vocabulary.language_codes)
        languages = [f"<|{code}|>" for code in self.setting.languages[rows]]
        return self.model.generate(
            **inputs,
            language=languages if is_multilingual else None,
            task=self.setting.options.task if is_multilingual else None,
            return_timestamps=self.setting.options.timestamps,
            force_unique_generate_call=True,  # a window each; otherwise timestamps make it seek on
            **self._common(),
        )

    def _decode_direct(self, rows: slice, inputs: dict[str, Any]) -> Any:
        options = self.setting.options
        rules = LogitsProcessorList()
        if options.timestamps:
            begin = self.initial.shape[1]
            rules.append(WhisperTimeStampLogitsProcessor(self.model.generation_config, begin_index=begin))
        return GenerationMixin.generate(
            self.model,
            **inputs,
            decoder_input_ids=self.initial[rows],
            logits_processor=rules,
            **self._common(),
        )

    def _common(self) -> dict[str, Any]:
        options, vocabulary = self.setting.options, self.setting.vocabulary
        return {
            "max_new_tokens": options.max_tokens,
            "suppress_tokens": vocabulary.suppressed(timestamps=options.timestamps),
            "begin_suppress_tokens": vocabulary.blank(),
            "num_beams": 1,
            "do_sample": False,
            "output_hidden_states": True,
            "return_dict_in_generate": True,
        }

    def _rows(self, output: Any, num_initial: int) -> Decoded:
        """Tokens, and the last hidden states: transformers takes them after the final LayerNorm."""
        last = torch.cat([step[-1] for step in output.decoder_hidden_states], dim=1)
        states = (last.float() if last.dtype == torch.bfloat16 else last).cpu().numpy()
        sampled = output.sequences.tolist()
        # Whisper's own `generate` leaves the initial tokens in as well.
        return [
            trim(self.setting.vocabulary, tokens[num_initial:], row, num_initial)
            for tokens, row in zip(sampled, states, strict=True)
        ]
