"""Embeddings of whole splits by all ranks, the validation MAP, and what is hard to tell apart."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from wealy_ray.errors import TrainingError
from wealy_ray.model import StateNetwork
from wealy_ray.model.embedder import pad
from wealy_ray.model.windows import StateWindows
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.evaluation import evaluate
from wealy_ray.retrieval.metrics import mean_ap
from wealy_ray.retrieval.multi_vector import MultiVectorScores, PackedSets
from wealy_ray.training.crops import CropReader
from wealy_ray.training.data import READERS, Tracks, name_some

PASS_ROWS = 16
"""Windows that go through the network together."""


@dataclass(frozen=True, eq=False)
class Embedder:
    """Embeds splits; ranks share the work, and all get all of it.

    Attributes:
        network: Is put into evaluation mode, and back.
        crops: Reads tracks.
        rank: This rank.
        world_size: Ranks.
        device: Where the network is.
    """

    network: StateNetwork
    crops: CropReader
    rank: int
    world_size: int
    device: torch.device

    def embed(self, tracks: Tracks, *, windows: bool) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings float32 [num_windows, z] of all tracks, and offsets int64 [num_tracks + 1] into them.

        What stands in a pass depends on the split alone, so any number of ranks gives the same bits.

        Raises:
            TrainingError: Embeddings are not finite.
        """
        where = StateWindows(mode="windows" if windows else "single").resolved(self.crops.length)
        starts = [where.starts(int(n)) for n in tracks.lengths]
        places = [(track, start) for track, mine in enumerate(starts) for start in mine]
        lengths = np.array([min(self.crops.length, int(tracks.lengths[t]) - s) for t, s in places])
        order = np.argsort(-lengths, kind="stable")
        passes = [order[i : i + PASS_ROWS] for i in range(0, len(order), PASS_ROWS)]
        mine = {n: self._embed(tracks, [places[i] for i in passes[n]]) for n in self._share(len(passes))}
        found = self._gathered(mine)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        z = np.concatenate([found[n] for n in range(len(passes))])[back]
        wrong = {tracks.track_ids[places[i][0]] for i in np.flatnonzero(~np.isfinite(z).all(1))}
        if wrong:  # a MAP over them would be a number all the same
            raise TrainingError(
                f"embeddings are not finite of {name_some(sorted(wrong))}: look at their states, or extract them again"
            )
        return z, np.cumsum([0, *map(len, starts)], dtype=np.int64)

    def _share(self, num: int) -> Iterator[int]:
        return iter(range(self.rank, num, self.world_size))

    @torch.no_grad()
    def _embed(self, tracks: Tracks, places: list[tuple[int, int]]) -> np.ndarray:
        with ThreadPoolExecutor(READERS) as pool:
            parts = list(pool.map(lambda p: self.crops.at(int(tracks.rows[p[0]]), p[1]), places))
        was_training = self.network.training
        self.network.eval()
        lengths = torch.tensor([len(part) for part in parts], device=self.device)
        z = self.network(pad(parts).to(self.device).float(), lengths).float().cpu().numpy()
        self.network.train(was_training)
        return np.asarray(z)

    def _gathered(self, mine: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        if self.world_size == 1:
            return mine
        parts: list[dict[int, np.ndarray]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(parts, mine)
        return {number: z for part in parts for number, z in part.items()}


def validation_map(tracks: Tracks, z: np.ndarray, offsets: np.ndarray) -> float:
    """Exact MAP over a split; distances of windows become one by their minimum."""
    cliques = [str(c) if c >= 0 else None for c in tracks.cliques.tolist()]
    collection = Collection.of(tracks.track_ids, cliques)
    sets = PackedSets.of_collection(collection, tracks.track_ids, z, offsets)
    scores = MultiVectorScores(sets, collection.candidates)
    return mean_ap([evaluate(scores, collection, views=["all"])])


def nearest_cliques(sampler_members: list[np.ndarray], z: np.ndarray, num: int) -> np.ndarray:
    """For each clique those whose mean embeddings are nearest, int64 [num_cliques, num], nearest first.

    Args:
        sampler_members: Tracks of each clique.
        z: float32 [num_tracks, z], one embedding per track.
        num: Neighbours; fewer where there are not as many cliques.
    """
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    centres = torch.from_numpy(np.stack([unit[m].mean(0) for m in sampler_members]))
    num = min(num, len(centres) - 1)
    found = []
    for start in range(0, len(centres), 1024):
        cosines = centres[start : start + 1024] @ centres.T
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -torch.inf
        found.append(cosines.topk(num, dim=1).indices)
    return torch.cat(found).numpy()
