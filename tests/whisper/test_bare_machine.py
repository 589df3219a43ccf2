"""The engine runs where only torch, numpy and openai-whisper are installed."""

from __future__ import annotations

import subprocess
import sys

from tests.pipelines.support import REPOSITORY

ABSENT = ("ray", "pyarrow", "pydantic", "yaml", "av", "fsspec", "s3fs", "botocore", "pandas")
SCRIPT = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # importing it fails
import torch
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, ReferenceOptions, load_whisper, transcribe_tracks
model = load_whisper("random-tiny").model
with Engine(model, EngineOptions(num_slots=2), DecodeOptions(timestamps=True, max_tokens=3)) as engine:
    print(len(engine.submit(torch.zeros(80, 3000)).result().states))
    (transcript,) = transcribe_tracks(engine, [torch.zeros(16000 * 3).numpy()], ReferenceOptions(temperatures=(0.0,)))
    print(len(transcript.results))
"""


def test_the_engine_needs_neither_ray_nor_the_pipeline_s_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "1"]
