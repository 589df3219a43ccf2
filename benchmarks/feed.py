"""What it takes to feed the engine: fetching, decoding and log-mel, in seconds of audio per second of one core.

    python benchmarks/feed.py --rounds 5 --out runs/bench/feed.json

Each stage runs in one thread over tracks of some minutes, the way the pipeline calls it. Figures are medians over
the rounds, of CPU time (every thread of this process, and the decoder's child) and of the wall clock; a server's own
CPU time is not in them. "Cores per GPU" is what an engine needs that takes so many seconds of audio per second;
log-mel on the device counts as no core at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.extract_run import sample_songs
from benchmarks.parts.feed_tracks import FORMATS, Track, make_tracks
from benchmarks.parts.places import s3_bucket
from wealy_ray.audio import BytesSource, IsolatedDecoder, decode, plan_windows
from wealy_ray.audio.mel import log_mel_windows
from wealy_ray.config import AudioSettings
from wealy_ray.storage import Storage

AUDIO = AudioSettings()
ENGINE_RATES = (2_000, 4_000)
"""Seconds of audio per second that an engine on one GPU may take."""
MEL_BANDS = (80, 128)
"""Up to large-v2, and large-v3 with turbo."""
Measured = dict[str, dict[str, dict[str, list[float]]]]
"""Stage -> format -> `cpu` and `wall` -> seconds of audio per second, by round."""


class Meter:
    """Collects seconds of audio per second.

    Args:
        children: Processes whose CPU time counts as ours: the isolated decoder's.
    """

    def __init__(self, children: set[int]) -> None:
        self.children = children
        self.measured: Measured = {}

    def run(self, stage: str, name: str, tracks: list[Track], work: Callable[[int, Track], Any]) -> None:
        """Time `work` over all tracks, one after the other."""
        wall_s, cpu_s = time.perf_counter(), self._cpu_s()
        for i, track in enumerate(tracks):
            work(i, track)
        cpu_s, wall_s = self._cpu_s() - cpu_s, time.perf_counter() - wall_s
        audio_s = sum(track.duration_s for track in tracks)
        rates = self.measured.setdefault(stage, {}).setdefault(name, {"cpu": [], "wall": []})
        rates["cpu"].append(audio_s / cpu_s)
        rates["wall"].append(audio_s / wall_s)

    def _cpu_s(self) -> float:
        # clock_getcpuclockid(3) forms the number of another process's clock so; /proc knows 10 ms only
        return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in self.children)


def child_pids() -> set[int]:
    """Processes that this one has started and that still run."""
    return {child.pid for child in psutil.Process().children()}


@contextlib.contextmanager
def storages(folder: Path, with_s3: bool) -> Iterator[dict[str, tuple[Storage, str]]]:
    """Stage name -> storage and base URI: a local folder, and a real S3 server on this machine."""
    found = {"fetch_local": (Storage(), str(folder))}
    if not with_s3:
        yield found
        return
    with s3_bucket("feed") as place:
        yield {**found, "fetch_s3": place}


def measure(args: argparse.Namespace) -> tuple[Measured, dict[str, list[Track]]]:
    """All stages, formats and rounds."""
    torch.set_num_threads(1)
    tracks = make_tracks(sample_songs(args.songs), count=args.tracks, track_s=args.track_s)
    decoder = IsolatedDecoder(AUDIO.max_duration_s, AUDIO.decode_timeout_s, AUDIO.decode_memory_mb << 20)
    with (
        tempfile.TemporaryDirectory() as name,
        decoder,
        storages(Path(name), args.s3) as places,
    ):
        for storage, base in places.values():
            for format_ in FORMATS:
                for i, track in enumerate(tracks[format_]):
                    storage.write(f"{base}/{i}.{format_}", track.data)
        servers = child_pids()
        one_round(Meter(set()), tracks, places, decoder)  # warm up: imports, connections, the decoder's child
        meter = Meter(child_pids() - servers)
        for _ in range(args.rounds):
            one_round(meter, tracks, places, decoder)
    return meter.measured, tracks


def one_round(
    meter: Meter,
    tracks: dict[str, list[Track]],
    places: dict[str, tuple[Storage, str]],
    decoder: IsolatedDecoder,
) -> None:
    """Every stage once, on every track."""
    for name in FORMATS:
        for stage, place in places.items():
            meter.run(stage, name, tracks[name], partial(_fetch, place, name))
        meter.run("decode", name, tracks[name], _decode_here)
        meter.run("decode_isolated", name, tracks[name], partial(_decode_isolated, decoder))
    for n_mels in MEL_BANDS:
        meter.run("mel", str(n_mels), tracks["wav"], partial(_mel, n_mels))


def _fetch(place: tuple[Storage, str], suffix: str, index: int, _: Track) -> None:
    storage, base = place
    uri = f"{base}/{index}.{suffix}"
    storage.info(uri)  # as the pipeline does
    storage.read(uri)


def _decode_here(_: int, track: Track) -> None:
    decode(BytesSource(track.data), max_duration_s=AUDIO.max_duration_s)


def _decode_isolated(decoder: IsolatedDecoder, _: int, track: Track) -> None:
    decoder.decode(BytesSource(track.data))


def _mel(n_mels: int, _: int, track: Track) -> None:
    log_mel_windows(track.samples, plan_windows(len(track.samples)), n_mels=n_mels)


def cores_per_gpu(stages: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Format -> seconds of audio per second of the engine -> cores, by where log-mel is computed."""

    def cost(stage: str, name: str) -> float:
        """Core-seconds per second of audio."""
        return 1.0 / stages[stage][name]["audio_s_per_core_s"]

    fetch = "fetch_s3" if "fetch_s3" in stages else "fetch_local"
    cores: dict[str, dict[str, dict[str, float]]] = {}
    for name in FORMATS:
        feed = cost(fetch, name) + cost("decode_isolated", name)
        mels = {f"mel_{n}_on_cpu": cost("mel", str(n)) for n in MEL_BANDS} | {"mel_on_device": 0.0}
        cores[name] = {
            str(rate): {where: round(rate * (feed + mel), 2) for where, mel in mels.items()}
            for rate in ENGINE_RATES
        }
    return cores


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and say what it means."""
    measured, tracks = measure(args)
    stages = {
        stage: {
            name: {
                "audio_s_per_core_s": statistics.median(rates["cpu"]),
                "audio_s_per_wall_s": statistics.median(rates["wall"]),
            }
            for name, rates in by_name.items()
        }
        for stage, by_name in measured.items()
    }
    return {
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "torch": torch.__version__,
        "settings": {name: str(value) for name, value in vars(args).items()},
        "tracks": {
            name: {
                "audio_s": sum(track.duration_s for track in encoded),
                "megabytes": sum(len(track.data) for track in encoded) / 1e6,
            }
            for name, encoded in tracks.items()
        },
        "stages": stages,
        "cores_per_gpu": cores_per_gpu(stages),
        "rounds": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--songs", type=int, default=24, help="sample songs that the tracks are made of")
    parser.add_argument("--tracks", type=int, default=4, help="tracks of each format")
    parser.add_argument("--track-s", type=float, default=210.0, help="length of a track in seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--s3", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = json.dumps(run(args), indent=2)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
