from __future__ import annotations

import numpy as np
import pytest
import torch

from wealy_ray.model import TransformerSettings, build_model
from wealy_ray.model.embedder import TrackEmbedder
from wealy_ray.model.windows import StateWindows

DIM = 6
SMALL = TransformerSettings(width=8, layers=2, heads=2, feed_forward=8, output_dim=4, positions="rotary")


@pytest.mark.parametrize("keep_tail", [True, False])
@pytest.mark.parametrize("stride", [1, 3, 7, 15])
def test_windows_are_those_of_a_slow_loop(stride: int, keep_tail: bool) -> None:
    windows = StateWindows(size=10, stride=stride, keep_tail=keep_tail).resolved(crop=99)
    for num_states in range(1, 40):
        expected, start = [], 0
        while start + 10 <= num_states:
            expected.append(start)
            start += stride
        if not expected:
            expected = [0]  # shorter than a window
        elif keep_tail and expected[-1] + 10 < num_states:
            expected.append(num_states - 10)
        assert windows.starts(num_states) == expected, num_states


def test_windows_follow_the_model() -> None:
    assert StateWindows().resolved(1500) == StateWindows(size=1500, stride=150)
    assert StateWindows().resolved(5).stride == 1
    single = StateWindows(mode="single", stride=3, keep_tail=False).resolved(40)
    assert single == StateWindows(mode="single", size=40)  # what does not matter gives no other id
    assert single.starts(100) == [0]


@pytest.mark.parametrize("mode", ["windows", "single"])
def test_embeddings_are_those_of_one_window_at_a_time(mode: str) -> None:
    torch.manual_seed(0)
    network = build_model(SMALL, DIM).eval()
    windows = StateWindows(mode=mode, size=12, stride=5).resolved(12)
    rng = np.random.default_rng(0)
    tracks = [rng.normal(size=(n, DIM)).astype(np.float16) for n in (3, 40, 12, 1, 29, 13, 12)]
    numbers = [len(track) for track in tracks]
    cpu = torch.device("cpu")
    for states_per_pass in (1, 30, 1000):
        embedder = TrackEmbedder(network, windows, states_per_pass, cpu)
        found = embedder.embed(numbers, tracks.__getitem__)
        again = embedder.embed(numbers, tracks.__getitem__)
        for track, vectors, same in zip(tracks, found, again, strict=True):
            expected = []
            for start in windows.starts(len(track)):
                part = torch.from_numpy(track[start : start + 12]).float()
                with torch.no_grad():
                    expected.append(network(part[None], torch.tensor([len(part)]))[0].numpy())
            np.testing.assert_allclose(vectors, expected, atol=1e-5)
            assert vectors.dtype == np.float32
            np.testing.assert_array_equal(vectors, same)
    assert embedder.embed([], tracks.__getitem__) == []
