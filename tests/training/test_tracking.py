"""Curves that others read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from wealy_ray.errors import ConfigError
from wealy_ray.storage import Storage
from wealy_ray.training.tracking import build_trackers


def test_tensorboard_files_of_two_processes_stand_side_by_side(tmp_path: Path) -> None:
    for first in (0, 2):
        (board,) = build_trackers(["tensorboard"], {}, Storage(), str(tmp_path), first)
        board.log({"epoch": first + 1.0, "loss": 0.5, "map": 0.25})
        board.flush()
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2
    for file in files:
        assert file.name.startswith("events.out.tfevents.")
        content = file.read_bytes()
        assert b"loss" in content
        assert b"map" in content
        assert b"epoch" not in content


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_sentence(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ConfigError, match=f"tracking by {name} needs it: pip install {name}"):
        build_trackers([name], {}, Storage(), str(tmp_path), 0)
