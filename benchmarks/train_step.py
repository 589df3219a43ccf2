"""How long a training step takes, and how long training waits for its data.

    python benchmarks/train_step.py --size paper --device cuda --loaders 4 --out runs/bench/train-step.json
    python benchmarks/train_step.py --out runs/bench/train-step.json

* `step`: the whole loop (forward, loss, backward, update) with real loader processes: median seconds of a step, and the
  share of the time that went into waiting for data. `--size paper` is the paper's network and batch of 64 pairs of
  crops of 1500 states, `small` is for a CPU.
* `held`: the paper's batch from real loader processes, but instead of computing, each step sleeps for `--hold-ms`, the
  appetite of an H200; on a GPU the states are copied there meanwhile. `waiting_share` is the share of the time in which
  nothing but waiting happened.

Tracks are noise, all longer than a crop. A store that is smaller than the machine's memory is read from there after the
first epoch; with more `--tracks` it comes from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.state_store import open_split, write_store
from wealy_ray.storage import Storage
from wealy_ray.training.data import Batches
from wealy_ray.training.feed import Feed
from wealy_ray.training.loop import Loop, Rank, Splits
from wealy_ray.training.recipe import TrainRecipe
from wealy_ray.training.sampler import CliqueSampler

SMALL = {"kind": "transformer", "width": 192, "layers": 2, "heads": 4, "feed_forward": 256, "output_dim": 128}
SIZES: dict[str, dict[str, Any]] = {
    "paper": {"model": {"kind": "transformer"}, "data": {"cliques_per_batch": 64, "crop": 1500}},
    "small": {"model": SMALL, "data": {"cliques_per_batch": 4, "crop": 300}},
}
EPOCHS = 1_000_000


class Clock:
    """A watcher that notes when steps end, and stops after enough of them."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.ends_s: list[float] = []
        self.waited_s: list[float] = []

    def wants(self, loop: Loop) -> tuple[bool, bool]:
        """Called after each step."""
        self.ends_s.append(time.perf_counter())
        self.waited_s.append(loop.waited_s)
        return False, len(self.ends_s) == self.num_steps

    def save(self, loop: Loop, *, is_wanted: bool) -> None:
        """Nothing is kept."""


def step(args: argparse.Namespace, place: str) -> dict[str, Any]:
    """The whole loop, for some steps."""
    recipe = TrainRecipe.model_validate(
        {
            **SIZES[args.size],
            "manifest": f"{place}/manifest.parquet",
            "store": f"{place}/store",
            "out": f"{place}/out",
            "optimiser": {"epochs": EPOCHS},
            "validation": {"every_epochs": EPOCHS},
            "resources": {"loaders": args.loaders},
        }
    )
    train, crops = open_split(Storage(), place, "train", recipe.data.crop)
    validation, _ = open_split(Storage(), place, "val", recipe.data.crop)
    clock = Clock(args.warm_up + args.steps)
    device = torch.device(args.device)
    loop = Loop(recipe, Splits(train, validation, crops), Rank(0, 1, device), clock)
    loop.run()
    between_s = [b - a for a, b in zip(clock.ends_s, clock.ends_s[1:], strict=False)][-args.steps :]
    waited_s = [b - a for a, b in zip(clock.waited_s, clock.waited_s[1:], strict=False)][-args.steps :]
    num_crops = 2 * recipe.data.cliques_per_batch
    taken_s = statistics.median(between_s)
    return {
        "parameters": loop.num_parameters,
        "crops": num_crops,
        "crop": recipe.data.crop,
        "seconds": taken_s,
        "tracks_per_s": num_crops / taken_s,
        "waiting_share": sum(waited_s) / sum(between_s),
        "all_seconds": between_s,
    }


def held(args: argparse.Namespace, place: str) -> dict[str, Any]:
    """Steps that only take their data."""
    tracks, crops = open_split(Storage(), place, "train", args.crop)
    sampler = CliqueSampler(tracks.cliques, cliques_per_batch=args.cliques)
    batches = Batches(tracks, sampler, crops, 0, 1, num_passes=8)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    feed = Feed(batches, (0, 0), EPOCHS, args.loaders, pins=on_gpu)
    waited_s, began_s, num_bytes = 0.0, 0.0, 0
    for number in range(args.warm_up + args.held_steps):
        if number == args.warm_up:
            waited_s, began_s, num_bytes = 0.0, time.perf_counter(), 0
        asked_s = time.perf_counter()
        states = next(feed).states
        got_s = time.perf_counter()
        waited_s += got_s - asked_s
        num_bytes += sum(x.nbytes for x in states)
        if on_gpu:
            copies = [x.to(device, non_blocking=True) for x in states]
        time.sleep(max(0.0, got_s + args.hold_ms / 1e3 - time.perf_counter()))
        if on_gpu:
            torch.cuda.synchronize()
            del copies
    whole_s = time.perf_counter() - began_s
    feed.close()
    return {
        "crops": 2 * sampler.slots,
        "megabytes_per_step": num_bytes / args.held_steps / 1e6,
        "megabytes_per_s_asked": num_bytes / args.held_steps / args.hold_ms / 1e3,
        "milliseconds_per_step": whole_s / args.held_steps * 1e3,
        "waiting_share": waited_s / whole_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU's step")
    parser.add_argument("--loaders", type=int, default=2, help="processes that read")
    parser.add_argument("--tracks", type=int, default=256, help="of the store")
    parser.add_argument("--num-states", type=int, default=2000, help="of each track")
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument(
        "--warm-up",
        type=int,
        default=12,
        help="steps before the clock runs",
    )
    parser.add_argument("--steps", type=int, default=10, help="steps of the loop")
    parser.add_argument("--hold-ms", type=float, default=72.0, help="what a held step takes at least")
    parser.add_argument("--held-steps", type=int, default=100)
    parser.add_argument("--cliques", type=int, default=64, help="pairs of a held step")
    parser.add_argument("--crop", type=int, default=1500, help="of a held step")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; default: where temporary files go"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        num_states = (args.num_states, args.num_states)
        size = write_store(Storage(), place, tracks=args.tracks, num_states=num_states, dim=args.dim)
        result = {
            "machine": {"cpus": os.cpu_count(), "device": _name_of(args.device)},
            "torch": torch.__version__,
            "settings": {key: str(value) for key, value in vars(args).items()},
            "store_megabytes": size / 1e6,
            "step": step(args, place),
            "held": held(args, place),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def _name_of(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
