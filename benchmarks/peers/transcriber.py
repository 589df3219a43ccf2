"""What both peers share, and what a user would write: songs to windows, and batches of windows to text."""

from __future__ import annotations

import io

import av
import numpy as np

from benchmarks.peers.job import Job
from wealy_ray.audio import SAMPLE_RATE_HZ, plan_windows

MAX_DURATION_S = 300  # as in our recipe


def split_song(data: bytes) -> list[np.ndarray]:
    """Encoded bytes -> 16 kHz mono windows of up to 30 s, one every 25 s, float32.

    PyAV without ado: it reads every format of the songs, and is what we use; soundfile reads no m4a.
    """
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
    with av.open(io.BytesIO(data)) as container:
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    frames += resampler.resample(None)
    samples = np.concatenate([frame.to_ndarray()[0] for frame in frames])[: MAX_DURATION_S * SAMPLE_RATE_HZ]
    return [samples[window.start : window.end] for window in plan_windows(len(samples))]


class Transcriber:
    """Hugging Face's Whisper from a local checkpoint."""

    def __init__(self, job: Job) -> None:
        import torch
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
        from transformers.utils import logging
        from whisper.tokenizer import get_tokenizer

        torch.set_num_threads(job.threads)
        logging.set_verbosity_error()
        self.job = job
        self.model = WhisperForConditionalGeneration.from_pretrained(job.checkpoint)
        self.features = WhisperFeatureExtractor.from_pretrained(job.checkpoint)
        num_languages = len(getattr(self.model.generation_config, "lang_to_id", {}))
        # stands in for the hub's WhisperTokenizer: the same text for the same ids
        self.tokenizer = get_tokenizer(num_languages > 0, num_languages=num_languages)

    def transcribe(self, windows: list[np.ndarray]) -> list[str]:
        """Text of each window, in order."""
        import torch

        self.job.note_call(len(windows))
        torch.set_num_threads(self.job.threads)  # the OpenMP count belongs to the thread
        features = self.features(windows, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
        with torch.inference_mode():
            # Without a language, as in the documentation's examples: `generate` then detects it for each
            # window, which costs it a second pass of the encoder and one step of the decoder.
            ids = self.model.generate(
                features,
                task="transcribe" if self.tokenizer.language else None,
                language=self.job.language,
                max_new_tokens=self.job.max_tokens,
            )
        return [self.tokenizer.decode([t for t in row if t < self.tokenizer.eot]) for row in ids.tolist()]
