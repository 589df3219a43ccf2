"""Our whole pipeline against what a user would write otherwise: Ray Data, or Daft, with Hugging Face's Whisper.

Same songs, windows, cores, weights and token limit; peers write texts and keep no states. Each contender runs as
a process of its own, in an order that rotates from round to round. Two clocks: from its start to its exit, and from
the first batch that reaches the model to the last file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.parts.extract_run import ROOT, link_songs, run_extract, sample_songs
from benchmarks.peers.job import Job
from tests.pipelines.support import environment, make_manifest, recipe_settings
from wealy_ray.storage import Storage
from wealy_ray.store import StoreReader
from wealy_ray.whisper import load_whisper
from wealy_ray.whisper.packaged import assemble_base

PEERS = ("ray_data_hf", "daft_hf")
PACKAGES = ("transformers", "daft")
LEAST_TEXT_SHARE = 0.5
CLOCKS = ("wall_s", "work_s")


def peers(args: argparse.Namespace) -> dict[str, Any]:
    """Part `peers`."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        sys.exit(f"the part 'peers' needs {' and '.join(absent)}; run: pip install -e '.[bench]'")
    from benchmarks.peers.hf_checkpoint import save_checkpoint

    weights = assemble_base(ROOT / ".cache" / "whisper-base")
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        checkpoint = save_checkpoint(load_whisper(str(weights)).model, base / "checkpoint")
        songs = link_songs(sample_songs(args.songs), base / "audio", args.repeat)
        contenders = {"ours": partial(run_ours, make_manifest(base / "audio", base / "m.parquet"), weights)}
        contenders |= {peer: partial(run_peer, peer, songs, checkpoint) for peer in PEERS}
        for i in range(args.rounds):
            order = [*contenders][i % len(contenders) :] + [*contenders][: i % len(contenders)]
            results = {}
            for contender in order:
                with tempfile.TemporaryDirectory(dir=base) as folder:
                    results[contender] = contenders[contender](Path(folder), args)
                print(json.dumps({"round": i, contender: results[contender]}), file=sys.stderr)
            check(results, len(songs))
            rounds.append(results)
    return report(rounds, len(songs), args)


def run_ours(manifest: Path, weights: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`wealy extract`, with states."""
    settings = recipe_settings(
        manifest,
        folder / "store",
        model=str(weights),
        decode={"max_tokens": args.max_tokens, "language": args.language},
        engine={"num_slots": args.slots, "num_threads": args.threads, "device": "cpu"},
        resources={"tracks_per_block": args.block, "tracks_per_shard": args.block, "engine_gpus": 0},
    )
    watched = run_extract(settings, folder, watch_memory=False)
    reader = StoreReader.open(Storage(), settings["store"])
    tracks = [reader.track(track_id) for track_id in reader.index.table["track_id"].to_pylist()]
    return {
        **{clock: watched[clock] for clock in ("startup_s", *CLOCKS)},
        "windows": sum(len(track.windows) for track in tracks),
        "songs_with_text": sum(bool(track.text.strip()) for track in tracks),
    }


def run_peer(
    peer: str, songs: list[Path], checkpoint: Path, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """One peer, texts only."""
    job = Job(
        songs=[str(song) for song in songs],
        checkpoint=str(checkpoint),
        out=str(folder / "texts"),
        batch=args.batch,
        threads=args.threads,
        max_tokens=args.max_tokens,
        language=args.language,
    )
    quiet = {"DAFT_ANALYTICS_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "true"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = environment(HF_HUB_OFFLINE="1", PYTHONPATH=os.pathsep.join(paths), **quiet)
    began_s = time.time()
    done = subprocess.run(
        job.command(f"benchmarks.peers.{peer}"),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    wall_s = time.time() - began_s
    if done.returncode:
        sys.exit(f"{peer} failed:\n{done.stdout}{done.stderr}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"event"')]
    events = {line.pop("event"): line for line in lines}
    texts = defaultdict(list)
    for row in pq.read_table(job.out).to_pylist():
        texts[row["path"]].append(row["text"])
    return {
        "startup_s": events["first_batch"]["at_s"] - began_s,
        "work_s": events["last_file"]["at_s"] - events["first_batch"]["at_s"],
        "wall_s": wall_s,
        "windows": sum(len(parts) for parts in texts.values()),
        "songs_with_text": sum(any(part.strip() for part in parts) for parts in texts.values()),
        "batches": events["batches"]["windows"],
    }


def check(results: dict[str, dict[str, Any]], num_songs: int) -> None:
    """Refuses a round in which the contenders did different work."""
    windows = {name: result["windows"] for name, result in results.items()}
    if len(set(windows.values())) > 1:
        sys.exit(f"the contenders did different numbers of windows: {windows}")
    for name, result in results.items():
        if result["songs_with_text"] < LEAST_TEXT_SHARE * num_songs:
            sys.exit(f"{name} found text in {result['songs_with_text']} of {num_songs} songs only")


def report(
    rounds: list[dict[str, dict[str, Any]]], num_songs: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Medians over the rounds; a speedup is the peer's time over ours within one round."""
    medians = {
        name: {clock: statistics.median(r[name][clock] for r in rounds) for clock in ("startup_s", *CLOCKS)}
        for name in ("ours", *PEERS)
    }
    speedup = {
        f"ours_over_{peer}": {
            clock: statistics.median(r[peer][clock] / r["ours"][clock] for r in rounds) for clock in CLOCKS
        }
        for peer in PEERS
    }
    names = ("slots", "batch", "threads", "max_tokens", "language", "block")
    return {
        "songs": num_songs,
        "windows": rounds[0]["ours"]["windows"],
        "weights": "whisper base",
        "settings": {name: getattr(args, name) for name in names},
        "versions": {name: importlib.metadata.version(name) for name in ("ray", *PACKAGES)},
        "median": medians,
        "speedup": speedup,
        "rounds": rounds,
    }
