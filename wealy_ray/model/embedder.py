"""Embeddings of whole tracks: states -> windows -> network, windows of like length together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wealy_ray.model.networks import StateNetwork
from wealy_ray.model.windows import StateWindows
from wealy_ray.storage.ahead import read_ahead

READERS = 8
"""Tracks that are read at a time: their latencies overlap, and the network need not wait for them."""


@dataclass(frozen=True, eq=False)
class TrackEmbedder:
    """A network that embeds tracks.

    What stands in a pass depends on the tracks of the call and their lengths alone; padding takes no part in a
    result, so another call gives the same vectors up to rounding, and the same call the same bits.

    Attributes:
        network: In evaluation mode, on `device`.
        windows: What of a track goes through it, resolved.
        states_per_pass: States, padding included, that go through the network together; at least one window does.
        device: Where the network is.
        precision: Of its products.
    """

    network: StateNetwork
    windows: StateWindows
    states_per_pass: int
    device: torch.device
    precision: Literal["float32", "bfloat16"] = "float32"

    def embed(self, num_states: Sequence[int], read: Callable[[int], np.ndarray]) -> list[np.ndarray]:
        """Embeds tracks.

        Args:
            num_states: States of each track, at least one.
            read: Gives the states of a track by its place, float16 [num_states, dim], or as many as its windows reach;
                called by several threads.

        Returns:
            For each track float32 [num_windows, z].
        """
        size = self.windows.size
        assert size is not None, "windows are resolved first"
        starts = [self.windows.starts(n) for n in num_states]
        found: list[list[np.ndarray]] = [[] for _ in starts]
        # all windows of a track have one length: the longest tracks first leave little to pad
        order = sorted(range(len(starts)), key=lambda place: -min(num_states[place], size))
        places: list[int] = []
        parts: list[np.ndarray] = []

        def run_pass() -> None:
            for place, vector in zip(places, self._run(parts), strict=True):
                found[place].append(vector)
            places.clear()
            parts.clear()

        for place, states in zip(order, read_ahead(read, order, READERS), strict=True):
            for start in starts[place]:
                if parts and (len(parts) + 1) * len(parts[0]) > self.states_per_pass:
                    run_pass()
                places.append(place)
                parts.append(states[start : start + size])
        if parts:
            run_pass()
        return [np.stack(vectors) for vectors in found]

    @torch.no_grad()
    def _run(self, parts: list[np.ndarray]) -> np.ndarray:
        lengths = torch.tensor([len(part) for part in parts], device=self.device)
        states = pad(parts).to(self.device).float()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            z = self.network(states, lengths)
        return np.asarray(z.float().cpu().numpy())


def pad(parts: Sequence[np.ndarray]) -> Tensor:
    """float16 [B, T, dim] of parts [n, dim], zeros behind."""
    padded = np.zeros((len(parts), max(len(p) for p in parts), parts[0].shape[1]), np.float16)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return torch.from_numpy(padded)
