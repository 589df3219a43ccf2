"""A short smoke: the benchmarks run and their JSON holds what the documents quote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.pipelines.support import REPOSITORY, environment


def run(script: str, *arguments: str, out: Path) -> dict:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments, "--out", str(out)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_engine_benchmark(tmp_path: Path) -> None:
    small = (
        "--weights",
        "random-tiny",
        "--windows",
        "3",
        "--slots",
        "2",
        "--rounds",
        "1",
        "--max-tokens",
        "4",
    )
    result = run("engine.py", *small, out=tmp_path / "engine.json")
    assert result["agreement_with_one_by_one"]["tokens_equal_share"] == 1.0
    assert result["agreement_with_one_by_one"]["states_relative_l2_max"] < 2e-5
    assert result["wall"]["speedup"]["decoder_over_stock_one_by_one"] > 0


def test_pipeline_benchmark(tmp_path: Path) -> None:
    result = run("pipeline.py", "--part", "memory", "--tracks", "40", out=tmp_path / "pipeline.json")
    assert result["memory"]["tracks"] == 40
    assert result["memory"]["by_stage"]["engine"]["peak_mib"] > 100
