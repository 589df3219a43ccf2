"""Whole songs as `whisper.transcribe` takes them: windows that follow each other, each a prompt to the next.

Fallback is off (temperature 0 alone), languages are detected per song. Ours takes all songs at once, stock one
by one: a song's windows cannot be batched with each other.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
import whisper
from whisper.model import Whisper

from benchmarks.parts.fixed_plan import engine_options
from benchmarks.parts.inputs import WINDOW_S, WINDOW_SAMPLES, Weights, audio_files, read_audio
from benchmarks.parts.measure import Timings
from wealy_ray.whisper import DecodeOptions, Engine, ReferenceOptions, transcribe_tracks

PEERS = ("stock_transcribe",)


def run(arguments: argparse.Namespace, weights: Weights) -> dict:
    """Measure both; the report for the JSON."""
    check_peers(arguments.peers)
    songs = whole_songs(arguments)
    samples = list(songs.values())
    decode = DecodeOptions(timestamps=True, max_tokens=arguments.max_tokens)
    engine = Engine(weights.model, engine_options(arguments), decode)
    options = ReferenceOptions(temperatures=(0.0,))
    with engine, torch.no_grad():
        engine.wait_until_ready()
        model = weights.model.to(engine.device)
        num_windows = sum(map(len, samples)) / WINDOW_SAMPLES
        timings = Timings(num_windows, engine.device)
        stock = partial(stock_transcribe, model, samples, arguments.max_tokens, engine.dtype)
        for _ in range(arguments.rounds):
            transcripts = timings.run("whole_ours", partial(transcribe_tracks, engine, samples, options))
            texts = timings.run("whole_stock_transcribe", stock)
        stats = engine.stats()
    rows = [
        {
            "song": name,
            "seconds": len(songs[name]) / whisper.audio.SAMPLE_RATE,
            "windows": len(transcript.results),
            "text_equal": transcript.text.strip() == text.strip(),
        }
        for name, transcript, text in zip(songs, transcripts, texts, strict=True)
    ]
    return {
        "settings": {
            "weights_digest": weights.digest,
            "device": str(engine.device),
            "dtype": str(engine.dtype),
            "audio_seconds": num_windows * WINDOW_S,
        },
        **timings.report(),
        "text_equal_share": sum(row["text_equal"] for row in rows) / len(rows),
        "songs": rows,
        "slot_utilisation": stats.utilisation,
    }


def check_peers(names: str | None) -> None:
    """Refuse peers that do not transcribe whole songs."""
    if names not in (None, "stock", *PEERS):
        raise SystemExit(
            f"error: the reference plan has no peer {names!r}; valid are {', '.join(PEERS)} and stock"
        )


def whole_songs(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Songs in path order until they hold the windows asked for; names are relative paths."""
    songs: dict[str, np.ndarray] = {}
    for path in audio_files(arguments.songs):
        if sum(map(len, songs.values())) >= arguments.windows * WINDOW_SAMPLES:
            break
        songs[str(path.relative_to(arguments.songs))] = read_audio(path)
    return songs


def stock_transcribe(
    model: Whisper, samples: list[np.ndarray], max_tokens: int, dtype: torch.dtype
) -> list[str]:
    half = dtype != torch.float32
    return [
        whisper.transcribe(model, song, temperature=0.0, sample_len=max_tokens, fp16=half)["text"]
        for song in samples
    ]
