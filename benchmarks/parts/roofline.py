"""What a Whisper model must compute and read at least, from its dimensions.

Legend: D width, L layers, A audio positions (1500), V vocabulary. A multiply-add is 2 FLOP.
"""

from __future__ import annotations

import statistics

import torch
from whisper.model import ModelDimensions

from wealy_ray.whisper import EngineStats

CONVOLUTION_WIDTH = 3


def encoder_flop(dims: ModelDimensions) -> int:
    """FLOP of the encoder for one window: convolutions, linear maps and attention's two products."""
    positions, width = dims.n_audio_ctx, dims.n_audio_state
    first = 2 * (2 * positions) * CONVOLUTION_WIDTH * dims.n_mels * width
    second = 2 * positions * CONVOLUTION_WIDTH * width * width
    linear = 2 * positions * (4 + 8) * width * width  # query, key, value, out; MLP of 4 D
    attention = 2 * 2 * positions * positions * width
    return first + second + dims.n_audio_layer * (linear + attention)


def decoder_weight_bytes(dims: ModelDimensions, dtype: torch.dtype) -> int:
    """Bytes of weights that every step reads, however many rows it has.

    Per layer 4 D^2 of self-attention, 2 D^2 of cross-attention (keys and values are made once per window) and
    8 D^2 of the MLP; then the embedding as output projection. Biases and norms are left out.
    """
    width = dims.n_text_state
    return (dims.n_text_layer * 14 * width * width + dims.n_vocab * width) * dtype.itemsize


def cross_cache_bytes(dims: ModelDimensions, dtype: torch.dtype) -> int:
    """Bytes of cross-attention keys and values that every step reads for one row."""
    return 2 * dims.n_text_layer * dims.n_audio_ctx * dims.n_text_state * dtype.itemsize


def rooflines(
    dims: ModelDimensions,
    dtype: torch.dtype,
    *,
    num_windows: int,
    seconds_per_window: dict[str, float],
    decoder_rounds: list[EngineStats],
    peak_tflops: float | None,
    peak_tbps: float | None,
) -> dict:
    """What was reached of the machine.

    The decoder's bytes are those of its weights once per step and of the cross-attention cache once per live
    row and step. Its own cache is left out, and so is the FLOP of making the cross-attention cache.

    Args:
        dims: The model's.
        dtype: What is computed in.
        num_windows: Decoded in a round.
        seconds_per_window: Medians of `encoder_ours`, `decoder_ours` and `whole_ours`.
        decoder_rounds: What the engine counted in each round of the decoder part.
        peak_tflops: The machine's, for `dtype`.
        peak_tbps: The machine's memory bandwidth.

    Returns:
        Work per window, achieved rates, and their share of the peaks (None without peaks).
    """
    weight_bytes, row_bytes = decoder_weight_bytes(dims, dtype), cross_cache_bytes(dims, dtype)
    bytes_per_window = statistics.median(
        (stats.steps * weight_bytes + stats.live_slot_steps * row_bytes) / num_windows
        for stats in decoder_rounds
    )
    tflop, tbytes = encoder_flop(dims) / 1e12, bytes_per_window / 1e12
    tflops, tbps = tflop / seconds_per_window["encoder_ours"], tbytes / seconds_per_window["decoder_ours"]
    report = {
        "encoder_tflop_per_window": tflop,
        "encoder_tflops": tflops,
        "decoder_weight_bytes_per_step": weight_bytes,
        "decoder_cross_cache_bytes_per_row_and_step": row_bytes,
        "decoder_bytes_per_window": bytes_per_window,
        "decoder_tbps": tbps,
        "peak_tflops": peak_tflops,
        "peak_tbps": peak_tbps,
        "encoder_share_of_peak": tflops / peak_tflops if peak_tflops else None,
        "decoder_share_of_peak": tbps / peak_tbps if peak_tbps else None,
    }
    if peak_tflops and peak_tbps:
        floor_s = tflop / peak_tflops + tbytes / peak_tbps
        report["floor_seconds_per_window"] = floor_s
        report["whole_share_of_floor"] = floor_s / seconds_per_window["whole_ours"]
    return report
