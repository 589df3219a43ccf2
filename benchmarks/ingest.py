"""Random crops of states, as training reads them, against bare reads of the same bytes.

    python benchmarks/ingest.py --rounds 5 --out runs/bench/ingest.json

From a local store, files in the kernel's memory (`warm`) and forgotten before each run (`cold`, what the disk gives);
one thread, one buffer that is used again:

* `pread`: the same bytes, their places known and their files open.
* `crops`: the training's reader. `ratio_to_pread` is the ratio of median seconds.
* `pread_fresh`: as `pread`, into memory that was not used before, as if each batch were built anew.
* `crops_first`: whole tracks that are read for the first time, and verified.

`batches` are whole batches, from the draw to the padding, by the training's threads into a slot of the feed, against
`pread` of as many bytes into the same memory by as many threads. `whole` is all of this for tracks that are shorter
than a crop. From the S3 server of the tests, which shares this machine's cores, by the training's threads: without a
cache, filling it, and from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.places import s3_bucket
from benchmarks.parts.state_store import forget, open_split, write_store
from wealy_ray.storage import Storage
from wealy_ray.storage.local import fill
from wealy_ray.store import TrackCache
from wealy_ray.store.shard import shard_uri
from wealy_ray.training.crops import CropReader
from wealy_ray.training.data import READERS, Batches, Tracks
from wealy_ray.training.feed import Slot
from wealy_ray.training.sampler import CliqueSampler


@dataclass(frozen=True)
class Crop:
    """What is read: states of a row of the index."""

    row: int
    start: int
    length: int


def draw(tracks: Tracks, crop: int, count: int) -> list[Crop]:
    """Crops of different tracks at random."""
    rng = np.random.default_rng(1)
    crops = []
    for track in rng.permutation(len(tracks))[:count].tolist():
        length = min(crop, int(tracks.lengths[track]))
        start = int(rng.integers(0, int(tracks.lengths[track]) - length + 1))
        crops.append(Crop(int(tracks.rows[track]), start, length))
    return crops


class BareReads:
    """What there is to beat: places are known, files are open.

    Args:
        reader: Of a local store.
        crops: What is read.
    """

    def __init__(self, reader: CropReader, crops: list[Crop]) -> None:
        payloads, width = reader.payloads, reader.dim * 2
        self.files = [
            os.open(shard_uri(payloads.root, name), os.O_RDONLY | os.O_CLOEXEC) for name in payloads.shards
        ]
        self.places = [
            (
                self.files[payloads.shard[c.row]],
                int(payloads.offset[c.row]) + c.start * width,
                c.length * width,
            )
            for c in crops
        ]
        self.num_bytes = sum(length for *_, length in self.places)

    def again(self, out: memoryview) -> None:
        """Into one buffer, again and again."""
        for file, offset, length in self.places:
            assert fill(file, offset, out[:length]) == length

    def fresh(self) -> None:
        """Into memory of their own."""
        kept = [os.pread(*place) for place in ((file, n, offset) for file, offset, n in self.places)]
        assert sum(map(len, kept)) == self.num_bytes

    def side_by_side(self, memory: memoryview, pool: ThreadPoolExecutor) -> None:
        """One after the other in memory, by threads."""
        ends = np.cumsum([0, *(length for *_, length in self.places)]).tolist()
        parts = [memory[a:b] for a, b in pairwise(ends)]
        list(pool.map(lambda place, part: fill(place[0], place[1], part), self.places, parts))

    def close(self) -> None:
        """Closes the files."""
        for file in self.files:
            os.close(file)


def read_all(reader: CropReader, crops: list[Crop], out: np.ndarray) -> None:
    """Every crop into one buffer."""
    for crop in crops:
        reader.read(crop.row, crop.start, out[: crop.length])


def timed(work: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def figures(seconds: dict[str, list[float]], num_crops: int, num_bytes: int) -> dict[str, Any]:
    """Medians as rates, and over the bare read where there is one."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found: dict[str, Any] = {
        name: {"tracks_per_s": num_crops / s, "megabytes_per_s": num_bytes / s / 1e6}
        for name, s in medians.items()
    }
    if "pread" in medians:
        for name, rates in found.items():
            rates["ratio_to_pread"] = medians["pread"] / medians[name]
    return found | {"seconds": seconds}


def local(args: argparse.Namespace, folder: Path, num_states: tuple[int, int]) -> dict[str, Any]:
    """Rounds over a local store; contenders take turns."""
    storage = Storage()
    size = write_store(storage, str(folder), tracks=args.tracks, num_states=num_states, dim=args.dim)
    tracks, reader = open_split(storage, str(folder), "train", args.crop)
    wanted = draw(tracks, args.crop, args.crops)
    bare, out = BareReads(reader, wanted), np.zeros((args.crop, args.dim), np.float16)
    contenders: dict[str, Callable[[], Any]] = {
        "pread": lambda: bare.again(out.data.cast("B")),
        "crops": lambda: read_all(reader, wanted, out),
        "pread_fresh": bare.fresh,
    }
    warm: dict[str, list[float]] = {name: [] for name in contenders}
    cold: dict[str, list[float]] = {name: [] for name in contenders}
    contenders["pread"]()  # brings the files into the kernel's memory
    if num_states[1] <= args.crop:
        warm["crops_first"] = [timed(contenders["crops"])]
    for number in range(args.rounds + 1):  # the first warms up
        for name, work in contenders.items():
            taken_s = timed(work)
            warm[name] += [taken_s] if number else []
    found = {
        "store_megabytes": size / 1e6,
        "num_states": list(num_states),
        "warm": figures(warm, len(wanted), bare.num_bytes),
        "batches": batches(args, tracks, reader),
    }
    for _ in range(args.rounds):
        for name, work in contenders.items():
            forget(folder)
            cold[name].append(timed(work))
    bare.close()
    return found | {"cold": figures(cold, len(wanted), bare.num_bytes)}


def batches(args: argparse.Namespace, tracks: Tracks, reader: CropReader) -> dict[str, Any]:
    """Whole batches of pairs."""
    sampler = CliqueSampler(tracks.cliques, cliques_per_batch=min(args.cliques, args.tracks // 2))
    made = Batches(tracks, sampler, reader, 0, 1, num_passes=8)
    memory = Slot(made.most_bytes).memory
    rows = sampler.batch(0, 0).tracks
    crops = [Crop(int(tracks.rows[t]), 0, min(args.crop, int(tracks.lengths[t]))) for t in rows]
    bare = BareReads(reader, crops)
    seconds: dict[str, list[float]] = {"pread": [], "batches": []}
    with ThreadPoolExecutor(READERS) as pool:
        for number in range(args.rounds + 1):
            taken_s = {
                "pread": timed(lambda: bare.side_by_side(memory, pool)),
                "batches": timed(lambda: made.read((0, 0), memory, pool)),
            }
            for name, each_s in taken_s.items():
                seconds[name] += [each_s] if number else []
    bare.close()
    return figures(seconds, len(crops), bare.num_bytes)


def remote(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds over a store in S3; each fills a cache of its own."""
    seconds: dict[str, list[float]] = {"no_cache": [], "filling": [], "from_cache": []}
    outs = [np.zeros((args.crop, args.dim), np.float16) for _ in range(READERS)]
    with s3_bucket("ingest") as (storage, bucket), ThreadPoolExecutor(READERS) as pool:
        num_states = (args.num_states, args.num_states)
        write_store(storage, bucket, tracks=args.s3_tracks, num_states=num_states, dim=args.dim)
        for number in range(args.rounds + 1):  # the first warms up
            cache = TrackCache(str(folder / f"cache-{number}"), 2**40)
            for name, mine in (("no_cache", None), ("filling", cache), ("from_cache", cache)):
                tracks, reader = open_split(storage, bucket, "train", args.crop, mine)
                wanted = draw(tracks, args.crop, args.s3_tracks)
                shares = [wanted[i::READERS] for i in range(READERS)]
                taken_s = timed(lambda r=reader, s=shares: list(pool.map(partial(read_all, r), s, outs)))
                seconds[name] += [taken_s] if number else []
    return figures(seconds, len(wanted), sum(c.length for c in wanted) * args.dim * 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tracks", type=int, default=512, help="of the local store")
    parser.add_argument("--num-states", type=int, default=2000, help="of each track")
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--crop", type=int, default=1500)
    parser.add_argument("--crops", type=int, default=400, help="crops of a round")
    parser.add_argument("--cliques", type=int, default=64, help="pairs in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--s3", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--s3-tracks", type=int, default=100, help="each read once a round")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; default: where temporary files go"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        shorter = (args.crop * 2 // 5, args.crop)
        result = {
            "machine": {"cpus": os.cpu_count()},
            "settings": {key: str(value) for key, value in vars(args).items()},
            "crops": local(args, folder / "crops", (args.num_states, args.num_states)),
            "whole": local(args, folder / "whole", shorter),
        }
        if args.s3:
            result["s3"] = remote(args, folder)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
