"""The report of a real training: what the loop leaves is what the page shows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.training.test_loop import a_recipe
from wealy_ray.catalog import read_manifest, write_manifest
from wealy_ray.report.run_page import write_report
from wealy_ray.storage import Storage
from wealy_ray.training.job import Job
from wealy_ray.training.keeper import Keeper
from wealy_ray.training.loop import Loop, Rank


class Deaf:
    """Hears nothing, and tells nobody."""

    def tell(self, pulse: Any) -> None:
        pass

    def wants(self) -> tuple[bool, bool]:
        return False, False


def test_a_real_training_has_a_page(song_store: Path, tmp_path: Path) -> None:
    optimiser = {"learning_rate": 5e-3, "epochs": 4, "warmup_epochs": 1}
    job = Job.open(a_recipe(song_store, out=str(tmp_path / "out"), optimiser=optimiser))
    job.begin()
    loop = Loop(job.recipe, job.splits, Rank(0, 1, torch.device("cpu")), Keeper(job, Deaf()))
    loop.run()
    page = Path(write_report(Storage(), str(tmp_path / "out"))).read_text()
    assert "nobody is at work on it: 4 of 4 epochs" in page  # the model is not yet written
    job.finish(loop)
    page = Path(write_report(Storage(), str(tmp_path / "out"))).read_text()
    assert "Done after 4 of at most 4 epochs" in page
    assert f"<b>{loop.progression.best_map:.3f}</b> after epoch\n{loop.progression.best_epoch}." in page
    assert page.count("<img ") == 4
    assert re.search(r"languages \(training tracks\)</th><td>en 21, es 21</td>", page)
    for entry in loop.progression.history:
        assert ("map" not in entry) or f"<td>{entry['loss']:.4f}</td>\n<td>{entry['map']:.4f}</td>" in page


@pytest.mark.parametrize(
    ("decode", "told", "expected"),
    [
        ({}, "es", {"en": 21, "es": 21}),
        ({}, None, {"pt": 42}),  # what Whisper has heard, where the manifest says nothing
        ({"language": "pt"}, "es", {"pt": 42}),
        ({"language": "pt", "task": "translate"}, "es", {"en": 42}),
    ],
)
def test_languages_of_the_training_tracks(
    song_store: Path, tmp_path: Path, decode: dict, told: str | None, expected: dict
) -> None:
    place = tmp_path / "place"
    shutil.copytree(song_store, place, ignore=shutil.ignore_patterns("out*"))
    for path in place.glob("store/*/extractor.json"):
        path.write_text(json.dumps({"decode": decode}))
    uri, storage = str(place / "manifest.parquet"), Storage()
    if told is None:
        table = read_manifest(storage, uri).table
        nothing = pa.nulls(table.num_rows, pa.string())
        write_manifest(
            storage, uri, table.set_column(table.column_names.index("language"), "language", nothing)
        )
    assert Job.open(a_recipe(place)).languages == expected
