"""On a real GPU: graphs, streams, half precision. Everything here also runs on the CPU, in `test_backend`."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from whisper.model import Whisper

from tests.whisper.support import decode_all, noise, relative_l2
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, WindowResult
from wealy_ray.whisper.backend import CudaBackend
from wealy_ray.whisper.decoder import SlotDecoder, Step
from wealy_ray.whisper.encoder import BatchEncoder
from wealy_ray.whisper.vocabulary import Vocabulary

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(
    model: Whisper, windows: list[torch.Tensor], decode: DecodeOptions, dtype: str
) -> list[WindowResult]:
    options = EngineOptions(device="cuda", dtype=dtype, num_slots=8)
    with Engine(model, options, decode) as engine:
        return [future.result() for future in [engine.submit(window) for window in windows]]


@pytest.mark.parametrize("timestamps", [False, True])
def test_float32_agrees_with_the_cpu(base: Whisper, mels: list[torch.Tensor], timestamps: bool) -> None:
    decode = DecodeOptions(timestamps=timestamps, max_tokens=40)
    for ours, other in zip(
        on_gpu(base, mels, decode, "float32"), decode_all(base, mels, 8, decode), strict=True
    ):
        assert ours.tokens == other.tokens
        assert relative_l2(ours.states, other.states).max() < 2e-3  # cuDNN's convolutions use TF32


def test_half_precision_agrees_with_float32(base: Whisper, mels: list[torch.Tensor]) -> None:
    decode = DecodeOptions(max_tokens=100)
    full = on_gpu(base, mels, decode, "float32")
    half = on_gpu(base, mels, decode, "float16")
    equal = [pair for pair in zip(half, full, strict=True) if pair[0].tokens == pair[1].tokens]
    assert len(equal) >= 0.7 * len(full)  # 11 of 14 on an H200
    for ours, other in equal:
        assert ours.states.dtype == np.float16
        a, b = ours.states.astype(np.float32), other.states
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > 0.99


def test_half_precision_features_are_as_close_as_whisper_s_own(
    base: Whisper, mels: list[torch.Tensor]
) -> None:
    """Our LayerNorms leave out whisper's casts."""
    here = base.encoder
    there = copy.deepcopy(base.encoder).cuda()
    ours = BatchEncoder(base, 4, backend=CudaBackend(), dtype=torch.float16)
    with torch.inference_mode():
        found = [
            relative_l2(z.float().cpu().numpy(), here(mel[None])[0].numpy())
            for mel in mels[:4]
            for z in ours.encode([mel])
        ]
        whispers = [
            relative_l2(there(mel[None].half().cuda())[0].float().cpu().numpy(), here(mel[None])[0].numpy())
            for mel in mels[:4]
        ]
    assert np.median(found) < 1.2 * np.median(whispers)


def test_steps_do_not_wait_for_the_host(tiny: Whisper) -> None:
    with torch.inference_mode():  # as in the engine's thread
        decoder = SlotDecoder(
            tiny, Vocabulary.of(tiny), DecodeOptions(), 4, backend=CudaBackend(), dtype=torch.float16
        )
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchroniz"):
                torch.ones(1, device="cuda").item()  # what would happen to a step that waits
            decoder.run(Step(longest=0), 200)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_slots_are_chosen_from_free_memory(tiny: Whisper) -> None:
    with Engine(tiny, EngineOptions(device="cuda"), DecodeOptions(max_tokens=5)) as engine:
        engine.wait_until_ready()
        assert engine.num_slots == 256
        assert len(engine.submit(noise(1)[0].cuda()).result(timeout=60).tokens) == 5
