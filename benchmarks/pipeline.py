"""The whole pipeline against the bare engine on the same audio, and against others; the memory of a long run.

    python benchmarks/pipeline.py --out runs/bench/pipeline.json            # speed and memory
    python benchmarks/pipeline.py --part memory --tracks 2000
    python benchmarks/pipeline.py --part peers --slots 16                   # needs the extra `bench`

Part `speed`: real weights; the pipeline's clock runs from the moment the first block reaches the engine to the last
shard, so that start-up (Ray, loading weights) is told apart. Rounds alternate bare engine and pipeline.
Part `memory`: the tiny random-weight model, many short tracks; private memory (USS) of every process of the job,
sampled each second and summed by stage.
Part `peers`: see `pipeline_peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.extract_run import ROOT, STAGES, link_songs, run_extract, sample_songs
from benchmarks.parts.pipeline_peers import peers
from tests.pipelines.support import make_manifest, make_tracks, recipe_settings
from wealy_ray.audio import BytesSource, decode, plan_windows
from wealy_ray.audio.mel import log_mel_windows
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, decode_tracks, load_whisper
from wealy_ray.whisper.packaged import assemble_base


def bare_engine(weights: Path, songs: list[Path], args: argparse.Namespace) -> float:
    """Seconds for all songs: mel, encoder and decoder in this process; audio is decoded before."""
    torch.set_num_threads(args.threads)
    tracks = [decode(BytesSource(path.read_bytes()), max_duration_s=300).samples for path in songs]
    model = load_whisper(str(weights)).model
    options = EngineOptions(device="cpu", num_slots=args.slots)
    with Engine(model, options, DecodeOptions(timestamps=False, max_tokens=224)) as engine:
        decode_tracks(
            engine, [log_mel_windows(tracks[0], plan_windows(len(tracks[0]))[:1], n_mels=80)]
        )  # warm up
        began_s = time.perf_counter()
        mels = [log_mel_windows(t, plan_windows(len(t)), n_mels=model.dims.n_mels) for t in tracks]
        decode_tracks(engine, mels)
        return time.perf_counter() - began_s


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Part `speed`."""
    weights = assemble_base(ROOT / ".cache" / "whisper-base")
    songs = sample_songs(args.songs)
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            link_songs(songs, folder / "audio", args.repeat)
            settings = recipe_settings(
                make_manifest(folder / "audio", folder / "m.parquet"),
                folder / "store",
                model=str(weights),
                decode={"max_tokens": 224},
                engine={"num_slots": args.slots, "num_threads": args.threads, "device": "cpu"},
                resources={"tracks_per_block": args.block, "tracks_per_shard": args.block, "engine_gpus": 0},
            )
            bare_s = bare_engine(weights, songs * args.repeat, args)
            watched = run_extract(settings, folder, watch_memory=False)
        rounds.append(
            {
                "bare_tracks_per_s": len(songs) * args.repeat / bare_s,
                "pipeline_tracks_per_s": len(songs) * args.repeat / watched["work_s"],
                "ratio": bare_s / watched["work_s"],
                "startup_s": watched["startup_s"],
                "wall_s": watched["wall_s"],
                "slot_utilisation": watched["engine"]["slot_utilisation"],
            }
        )
        print(json.dumps(rounds[-1]), file=sys.stderr)
    medians = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    return {
        "songs": len(songs) * args.repeat,
        "weights": "whisper base",
        "median": medians,
        "rounds": rounds,
    }


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Part `memory`: is it flat?"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tracks(folder / "audio", args.tracks, seconds=1.0)
        settings = recipe_settings(
            make_manifest(folder / "audio", folder / "m.parquet"),
            folder / "store",
            engine={"num_slots": 16, "num_threads": 2, "device": "cpu"},
            resources={"tracks_per_block": 16, "tracks_per_shard": 64, "engine_gpus": 0},
            publish_every_s=10,
            progress_every_s=10,
        )
        watched = run_extract(settings, folder, watch_memory=True)
    samples = [s for s in watched["memory"] if s["at_s"] > watched["startup_s"]]
    third = max(1, len(samples) // 3)
    by_stage = {
        stage: {
            "first_third_mib": statistics.median(s[stage] for s in samples[:third]),
            "last_third_mib": statistics.median(s[stage] for s in samples[-third:]),
            "peak_mib": max(s[stage] for s in samples),
        }
        for stage in [*STAGES, "other"]
    }
    return {
        "tracks": args.tracks,
        "weights": "random-tiny",
        "tracks_per_s": args.tracks / watched["work_s"],
        "wall_s": watched["wall_s"],
        "slot_utilisation": watched["engine"]["slot_utilisation"],
        "by_stage": by_stage,
    }


def main() -> None:
    """Runs the parts and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["speed", "memory", "both", "peers"], default="both")
    parser.add_argument("--peers", dest="part", action="store_const", const="peers", help="as --part peers")
    parser.add_argument("--songs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block", type=int, default=12, help="tracks per block and per shard")
    parser.add_argument("--tracks", type=int, default=2000, help="of the memory part")
    parser.add_argument("--batch", type=int, default=16, help="peers: windows per call of the model")
    parser.add_argument("--repeat", type=int, default=1, help="take the songs so many times")
    parser.add_argument("--max-tokens", type=int, default=224, help="peers: sampled tokens per window")
    parser.add_argument("--language", help="peers: forced on all contenders; default: each detects it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "torch": torch.__version__,
    }
    if args.part in ("speed", "both"):
        result["speed"] = speed(args)
    if args.part in ("memory", "both"):
        result["memory"] = memory(args)
    if args.part == "peers":
        result["peers"] = peers(args)
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
