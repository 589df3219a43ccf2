"""On a real GPU: training in float32 as on the CPU, in bfloat16, from a checkpoint; losses; embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.test_losses import KINDS, loss_of
from tests.training.test_loop import a_recipe, train
from wealy_ray.model import AverageMLPSettings, ModelSettings, TransformerSettings, build_model
from wealy_ray.model.embedder import TrackEmbedder
from wealy_ray.model.windows import StateWindows
from wealy_ray.training.loop import Rank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
SIZES: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "feed_forward": 16, "output_dim": 8}
NO_DROPOUT = {"kind": "transformer", "dropout": 0.0, "standardise": True, **SIZES}
NETWORKS = [
    TransformerSettings(**SIZES),
    TransformerSettings(**SIZES, pooling="cls", positions="rotary"),
    TransformerSettings(**SIZES, pooling="attention", positions="sinusoidal"),
    AverageMLPSettings(width=16, output_dim=8),
]


def optimiser(precision: str = "auto", **changes: Any) -> dict[str, Any]:
    return {"learning_rate": 3e-3, "epochs": 6, "warmup_epochs": 1, "precision": precision, **changes}


def losses(recipe: Any, device: torch.device, **more: Any) -> list[float]:
    history = train(recipe, Rank(0, 1, device), **more).progression.history
    return [entry["loss"] for entry in history]


@pytest.mark.parametrize("loaders", [0, 2])
def test_float32_is_as_on_the_cpu(song_store: Path, loaders: int) -> None:
    """With loader processes the states come from pinned memory."""
    recipe = a_recipe(
        song_store,
        model=NO_DROPOUT,
        optimiser=optimiser("float32"),
        resources={"passes": 4, "loaders": loaders},
    )
    assert losses(recipe, GPU) == pytest.approx(losses(recipe, CPU), rel=1e-3)


def test_bfloat16_learns(song_store: Path) -> None:
    recipe = a_recipe(song_store, optimiser=optimiser(learning_rate=5e-3, epochs=30, warmup_epochs=2))
    loop = train(recipe, Rank(0, 1, GPU))
    history = loop.progression.history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert loop.progression.best_map > 0.6
    assert {parameter.dtype for parameter in loop.network.parameters()} == {torch.float32}


def test_a_checkpoint_goes_on(song_store: Path, tmp_path: Path) -> None:
    recipe = a_recipe(song_store, optimiser=optimiser("float32"), mining={"every_epochs": 2, "neighbours": 3})
    undisturbed = losses(recipe, GPU, folder=tmp_path / "a")
    assert losses(recipe, GPU, folder=tmp_path / "b", stops=(3, 7)) == pytest.approx(undisturbed, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(v) for v in kind.values()))
def test_losses_and_gradients_are_as_on_the_cpu(kind: dict[str, Any]) -> None:
    torch.manual_seed(0)
    z = torch.randn(24, 8)
    cliques = torch.arange(12).repeat(2)
    found = []
    for device in (CPU, GPU):
        mine = z.to(device).detach().requires_grad_()
        loss = loss_of(kind)(mine, cliques.to(device), None)
        loss.backward()
        assert mine.grad is not None
        found.append((loss.item(), mine.grad.cpu()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


@pytest.mark.parametrize("settings", NETWORKS, ids=lambda s: f"{s.kind}-{getattr(s, 'pooling', '')}")
def test_embeddings_are_as_on_the_cpu(settings: ModelSettings) -> None:
    torch.manual_seed(0)
    network = build_model(settings, 12).eval()
    windows = StateWindows(size=12, stride=5).resolved(12)
    rng = np.random.default_rng(0)
    tracks = [rng.normal(size=(n, 12)).astype(np.float16) for n in (3, 40, 12, 1, 29, 13, 12)]

    def embedded(device: torch.device, precision: str) -> np.ndarray:
        embedder = TrackEmbedder(network.to(device), windows, 100, device, precision)
        return np.concatenate(embedder.embed([len(track) for track in tracks], tracks.__getitem__))

    here = embedded(CPU, "float32")
    np.testing.assert_allclose(embedded(GPU, "float32"), here, atol=1e-4)
    half = embedded(GPU, "bfloat16")
    assert half.dtype == np.float32
    cosines = (half * here).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(here, axis=1)
    assert cosines.min() > 0.99
