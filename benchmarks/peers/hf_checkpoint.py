"""Whisper weights as a Hugging Face checkpoint on disk: what a user would download from the hub.

Needs `transformers` (`pip install -e '.[bench]'`), but no network.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from whisper.model import Whisper

from wealy_ray.whisper.rules import MAX_INITIAL_TIMESTAMP
from wealy_ray.whisper.vocabulary import Vocabulary

RENAMES = (
    (r"^encoder\.ln_post\.", "encoder.layer_norm."),
    (r"^decoder\.ln\.", "decoder.layer_norm."),
    (r"\.positional_embedding$", ".embed_positions.weight"),
    (r"\.token_embedding\.", ".embed_tokens."),
    (r"\.blocks\.", ".layers."),
    (r"\.cross_attn_ln\.", ".encoder_attn_layer_norm."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.attn\.", ".self_attn."),
    (r"_attn\.query\.", "_attn.q_proj."),
    (r"_attn\.key\.", "_attn.k_proj."),
    (r"_attn\.value\.", "_attn.v_proj."),
    (r"_attn\.out\.", "_attn.out_proj."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
)
"""openai-whisper's parameter names -> Hugging Face's below `model.`, applied one after the other."""


def save_checkpoint(model: Whisper, folder: Path) -> Path:
    """Write model, generation settings and feature extractor as `from_pretrained` reads them."""
    hugging_face_model(model).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=model.dims.n_mels).save_pretrained(folder)
    return folder


def hugging_face_model(model: Whisper) -> WhisperForConditionalGeneration:
    """Build the Hugging Face model with the same weights, in float32 and eval mode.

    Args:
        model: A multilingual or English-only Whisper model.

    Returns:
        A model that decodes greedily as `whisper.decode` does, suppressed tokens included.
    """
    vocabulary = Vocabulary.of(model)
    converted = WhisperForConditionalGeneration(_config(model, vocabulary))
    state = {f"model.{_renamed(name)}": tensor for name, tensor in model.state_dict().items()}
    state["proj_out.weight"] = model.decoder.token_embedding.weight
    converted.load_state_dict(state)
    converted.generation_config = _generation_config(vocabulary)
    return converted.float().eval()


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _config(model: Whisper, vocabulary: Vocabulary) -> WhisperConfig:
    dims = model.dims
    return WhisperConfig(
        vocab_size=dims.n_vocab,
        num_mel_bins=dims.n_mels,
        d_model=dims.n_audio_state,
        encoder_layers=dims.n_audio_layer,
        encoder_attention_heads=dims.n_audio_head,
        encoder_ffn_dim=4 * dims.n_audio_state,
        decoder_layers=dims.n_text_layer,
        decoder_attention_heads=dims.n_text_head,
        decoder_ffn_dim=4 * dims.n_text_state,
        max_source_positions=dims.n_audio_ctx,
        max_target_positions=dims.n_text_ctx,
        decoder_start_token_id=vocabulary.sot,
        bos_token_id=vocabulary.eot,
        eos_token_id=vocabulary.eot,
        pad_token_id=vocabulary.eot,
        suppress_tokens=None,  # these two belong into the generation settings
        begin_suppress_tokens=None,
    )


def _generation_config(vocabulary: Vocabulary) -> GenerationConfig:
    settings = {
        "decoder_start_token_id": vocabulary.sot,
        "bos_token_id": vocabulary.eot,
        "eos_token_id": vocabulary.eot,
        "pad_token_id": vocabulary.eot,
        "max_length": 448,  # as in the hub's checkpoints
        "no_timestamps_token_id": vocabulary.tokenizer.no_timestamps,
        "suppress_tokens": vocabulary.suppressed(timestamps=False),
        "begin_suppress_tokens": vocabulary.blank(),
        "is_multilingual": bool(vocabulary.language_codes),
        "return_timestamps": False,
        "max_initial_timestamp_index": MAX_INITIAL_TIMESTAMP,
    }
    if vocabulary.language_codes:
        first = vocabulary.first_language
        settings["lang_to_id"] = {
            f"<|{code}|>": first + i for i, code in enumerate(vocabulary.language_codes)
        }
        settings["task_to_id"] = {
            "transcribe": vocabulary.tokenizer.transcribe,
            "translate": vocabulary.tokenizer.translate,
        }
    return GenerationConfig(**settings)
