"""Exact MAP against the bare matrix product that it needs, and against what others do.

For each size, rounds alternate between the contenders; figures are median seconds, and ratios over the bare product
(torch's own, tile by tile, scores thrown away). The peers get the same vectors. Synthetic vectors; cliques as large as
DiscogsVI's (55,791 of 98,785 have two versions, the largest test clique has 658).

    python benchmarks/retrieval.py --sizes 2000 5000 20000 50000 --out runs/bench/retrieval.json
    python benchmarks/retrieval.py --sizes --discogs-tiles 8 --out runs/bench/retrieval-discogs.json
    python benchmarks/retrieval.py --sizes --discogs-tiles 1926 --device cuda --out runs/bench/retrieval-gpu.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.retrieval_peers import PEERS, RANX_UP_TO
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.evaluation import evaluate_tiles, num_tiles
from wealy_ray.retrieval.metrics import mean_ap
from wealy_ray.retrieval.scores import CANDIDATE_TILE, CPU, QUERY_TILE, VectorScores, products

DIM = 512
DISCOGS_TRACKS, DISCOGS_CLIQUES, DISCOGS_PAIRS = 493_049, 98_785, 55_791
LARGEST_CLIQUE = 658


def clique_sizes(num_tracks: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes whose sum is `num_tracks`, in DiscogsVI's proportions: 56 % pairs, the others with a heavy tail."""
    num_cliques = max(1, round(num_tracks * DISCOGS_CLIQUES / DISCOGS_TRACKS))
    pairs = round(num_cliques * DISCOGS_PAIRS / DISCOGS_CLIQUES)
    tail = np.minimum(3 + np.floor(rng.pareto(1.45, num_cliques - pairs) * 2.4), LARGEST_CLIQUE).astype(int)
    sizes = np.concatenate([np.full(pairs, 2), tail])
    while sizes.sum() != num_tracks:  # one by one among the larger ones, which hardly changes their shape
        step = 1 if sizes.sum() < num_tracks else -1
        places = rng.integers(pairs, len(sizes), min(abs(num_tracks - sizes.sum()), len(sizes) - pairs))
        for place in places:
            if 3 <= sizes[place] + step <= LARGEST_CLIQUE:
                sizes[place] += step
    return sizes


def problem(num_tracks: int) -> tuple[Collection, VectorScores]:
    """Cliques and vectors with a MAP that is neither 0 nor 1."""
    rng = np.random.default_rng(num_tracks)
    cliques = np.repeat(np.arange(len(sizes := clique_sizes(num_tracks, rng))), sizes)
    rng.shuffle(cliques)
    vectors = rng.standard_normal((num_tracks, DIM), np.float32)
    centres = rng.standard_normal((len(sizes), DIM), np.float32)
    vectors *= 2.0
    vectors += centres[cliques]
    collection = Collection.of([f"t{i:07d}" for i in range(num_tracks)], [f"c{c}" for c in cliques])
    return collection, VectorScores.cosine(collection, vectors, np.zeros(num_tracks, bool))


def bare_products(
    scores: VectorScores, tiles: int, multiply: Callable[..., Any], device: torch.device = CPU
) -> None:
    """All products of the tiles of queries with all candidates, and nothing else."""
    vectors = torch.from_numpy(scores.vectors).to(device)
    step = CANDIDATE_TILE if device.type == "cpu" else len(vectors)  # as `VectorScores` cuts them
    for q in range(tiles):
        queries = vectors[q * QUERY_TILE : (q + 1) * QUERY_TILE]
        for c in range(0, len(vectors), step):
            multiply(queries, vectors[c : c + step])
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(
    collection: Collection, scores: VectorScores, tiles: int, threads: int, device: torch.device = CPU
) -> float:
    """MAP of the tiles' queries."""
    tables = evaluate_tiles(
        scores, collection, range(tiles), views=["all"], device=device, num_threads=threads
    )
    return mean_ap(tables)


def contenders(
    collection: Collection, scores: VectorScores, tiles: int, arguments: argparse.Namespace
) -> dict[str, Callable[[], float | None]]:
    def bare() -> None:
        bare_products(scores, tiles, lambda x, y: x @ y.T)

    def bare_fastest() -> None:
        bare_products(scores, tiles, products)

    found: dict[str, Callable[[], float | None]] = {
        "bare_product": bare,
        "bare_product_onednn": bare_fastest,
        "ours": lambda: ours(collection, scores, tiles, arguments.threads),
    }
    if len(collection) <= arguments.peers_up_to:
        for name, peer in PEERS.items():
            if name == "ranx" and len(collection) > RANX_UP_TO:
                continue
            found[name] = lambda peer=peer: peer(scores.vectors, collection.cliques)
    return found


def measure(size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    collection, scores = problem(size)
    tiles = num_tiles(collection)
    times: dict[str, list[float]] = {}
    maps: dict[str, float | None] = {}
    faults: dict[str, str] = {}
    for number in range(arguments.rounds + 1):  # the first warms up
        for name, run in contenders(collection, scores, tiles, arguments).items():
            if name in faults:
                continue
            began_s = time.perf_counter()
            try:
                maps[name] = run()
            except ImportError as e:
                faults[name] = f"not installed: {e.name}"
                continue
            if number or arguments.rounds == 0:
                times.setdefault(name, []).append(time.perf_counter() - began_s)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tracks": size,
        "queries": len(collection.queries),
        "seconds": seconds,
        "ratio_to_bare_product": {name: s / seconds["bare_product"] for name, s in seconds.items()},
        "map": {name: value for name, value in maps.items() if value is not None},
        "not_run": faults,
        "peak_memory_mib": _peak_memory_mib(size, arguments.threads),
    }


def _peak_memory_mib(size: int, threads: int) -> float:
    """Highest resident memory of a process of its own that builds the problem and ranks its first two tiles."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_rank_two_tiles, (size, threads))


def _rank_two_tiles(size: int, threads: int) -> float:
    torch.set_num_threads(threads)
    collection, scores = problem(size)
    ours(collection, scores, min(2, num_tiles(collection)), threads)
    return peak_memory_mib()


def peak_memory_mib() -> float:
    """Highest resident memory of this process; the kernel's getrusage would count that of its parent as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def discogs(tiles: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A stated share of DiscogsVI's queries against all of its candidates."""
    device = torch.device(arguments.device)
    collection, scores = problem(DISCOGS_TRACKS)
    tiles = min(tiles, num_tiles(collection))
    ours(collection, scores, 1, arguments.threads, device)
    began_s = time.perf_counter()
    value = ours(collection, scores, tiles, arguments.threads, device)
    seconds = time.perf_counter() - began_s
    bare_products(scores, 1, lambda x, y: x @ y.T, device)
    began_s = time.perf_counter()
    bare_products(scores, tiles, lambda x, y: x @ y.T, device)
    bare_s = time.perf_counter() - began_s
    share = tiles / num_tiles(collection)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tracks": DISCOGS_TRACKS,
        "queries_run": min(tiles * QUERY_TILE, len(collection.queries)),
        "share": share,
        "seconds": seconds,
        "bare_product_seconds": bare_s,
        "ratio_to_bare_product": seconds / bare_s,
        "map_of_share": value,
        "whole_core_hours_extrapolated": seconds / share * arguments.threads / 3600,
        "peak_memory_mib": peak_memory_mib(),
        "peak_gpu_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20
        if device.type == "cuda"
        else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[2000, 5000, 20_000, 50_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-up-to", type=int, default=5000, help="peers are too slow beyond")
    parser.add_argument(
        "--discogs-tiles", type=int, default=0, help="tiles of 256 queries at DiscogsVI's size"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of --discogs-tiles")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "threads": arguments.threads,
        "dim": DIM,
        "vectors": "synthetic",
        "sizes": [measure(size, arguments) for size in arguments.sizes],
    }
    if arguments.discogs_tiles:
        result["discogs_vi"] = discogs(arguments.discogs_tiles, arguments)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
