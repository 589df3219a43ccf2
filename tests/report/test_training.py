"""The report of a training, from given curves."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest

from tests.report.test_evaluation import write_run
from tests.report.trainings import curves, healthy, write_lease, write_training
from wealy_ray.errors import ConfigError
from wealy_ray.report.evaluation import expected_chance
from wealy_ray.report.history import History
from wealy_ray.report.run_page import write_report
from wealy_ray.report.training_run import Training
from wealy_ray.storage import Storage


def page_of(root: Path) -> str:
    uri = write_report(Storage(), str(root))
    assert uri == f"{root}/report.html"
    return Path(uri).read_text()


def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', page, re.S)
    assert found, name
    return found.group()


def test_a_training_that_is_done(tmp_path: Path) -> None:
    entries = healthy()
    page = page_of(write_training(tmp_path / "first", entries))
    best = max((e for e in entries if "map" in e), key=lambda e: e["map"])
    assert f"<title>Training {tmp_path.name}/first</title>" in page
    assert "Done after 100 of at most 100 epochs." in page
    assert f"<b>{best['map']:.3f}</b> after epoch\n{best['epoch']:.0f}." in page
    assert f"<code>{tmp_path}/first/model</code>" in page
    assert "Nothing conspicuous" in section(page, "diagnostics")
    rows = re.findall(r"<tr.*?</tr>", section(page, "epochs").partition("<details>")[0], re.S)[1:]
    assert [re.search(r'scope="row">(\d+)', row)[1] for row in rows] == ["5", f"{best['epoch']:.0f}", "100"]  # type: ignore[index]
    for entry, row in zip((entries[4], best, entries[99]), rows, strict=True):
        assert f"<td>{entry['loss']:.4f}</td>\n<td>{entry['map']:.4f}</td>" in row
    assert section(page, "epochs").count("<td>0.") > 20  # all that were measured, folded
    facts = section(page, "facts")
    for words in (
        "split train: 4,000 tracks, 1,000 cliques",
        "split val: 800 tracks, 200 cliques",
        "en 3100, es 900",
        "s3://songs/manifest.parquet",
        "0123456789abcdef, 7",
        "transformer; width 768; layers 4",
        "nt_xent; temperature 0.1",
        "64 cliques x 2 versions",
        "12,345,678",
        "2 h 00 min",
        "812.5 tracks/s",
        "1.0% of the time",
        "ray 2.50.0, torch 2.8.0",
    ):
        assert words in facts, words


def test_every_curve_shows_something_and_stands_in_the_page(tmp_path: Path) -> None:
    steep = curves(
        40, lambda s: 5 * float(np.exp(-9 * s)), lambda s: 0.3 * s, gradient_norm=lambda s: 100 ** (1 - s)
    )
    for name, entries in (("steep", steep), ("one", healthy(1)), ("plain", healthy(40))):
        page = page_of(write_training(tmp_path / name, entries))
        files = sorted((tmp_path / name / "figures").glob("*.png"))
        assert [f.stem for f in files] == ["gradient_norm", "learning_rate", "loss", "validation_map"]
        for file in files:
            pixels = matplotlib.image.imread(io.BytesIO(file.read_bytes()))[..., :3]
            assert (np.abs(pixels - 1) > 0.05).any(axis=2).mean() > 0.005, file
        assert page.count("<img ") == 4
        assert all(s.startswith("data:image/png;base64,") for s in re.findall(r'src="([^"]*)', page))
        assert not re.search(r"https?://|<link|<script|@import|url\(", page)
        assert all(len(alt) > 20 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', page))


def test_curves_of_what_was_never_measured(tmp_path: Path) -> None:
    root = write_training(tmp_path, healthy(4)[:3], outcome="running", is_held=True)
    page = page_of(root)
    assert not (root / "figures" / "validation_map.png").exists()
    assert section(page, "epochs").count("<tr>") == 4
    assert "Best validation MAP" not in page


@pytest.mark.parametrize(
    ("outcome", "is_held", "state", "said"),
    [
        ("running", True, "At work: 12 of 300 epochs", "Nothing conspicuous"),
        ("running", False, "nobody is at work on it: 12 of 300", "goes on from the last checkpoint"),
        (None, False, "nobody is at work on it: 12 of 300", "goes on from the last checkpoint"),
        ("KeyboardInterrupt", False, "Ended as KeyboardInterrupt after 12 of 300", "was interrupted"),
        ("TrainingError", False, "Ended as TrainingError after 12 of 300", "the loss is nan in epoch 13"),
        ("AssertionError", False, "Ended as AssertionError after 12 of 300", "look at the job&#39;s log"),
    ],
)
def test_a_training_that_is_not_done(
    tmp_path: Path, outcome: str | None, is_held: bool, state: str, said: str
) -> None:
    error = {"error": "the loss is nan in epoch 13"} if outcome == "TrainingError" else {}
    facts = {"optimiser": {"epochs": 300}}
    entries = healthy(300)[:12]
    page = page_of(write_training(tmp_path, entries, outcome=outcome, is_held=is_held, facts=facts, **error))
    assert state in page
    assert said in section(page, "diagnostics")
    assert section(page, "diagnostics").count("<li>") == (said != "Nothing conspicuous")
    assert "<code>" not in page
    assert f"{entries[9]['map']:.4f}" in section(page, "epochs")


def test_before_the_first_epoch(tmp_path: Path) -> None:
    page = page_of(write_training(tmp_path, None, outcome=None))
    assert "<img" not in page
    assert "No epoch is finished" in section(page, "diagnostics")
    assert "transformer; width 768" in section(page, "facts")
    assert "Last run" not in page


def test_what_the_driver_left_counts_for_less_than_the_model(tmp_path: Path) -> None:
    root = write_training(tmp_path, healthy())
    record = json.loads((root / "run.json").read_text())
    for outcome, found in (("running", "done"), ("KeyboardInterrupt", "done"), ("ReconciliationError",) * 2):
        (root / "run.json").write_text(json.dumps({**record, "outcome": outcome}))
        assert Training.read(Storage(), str(root)).outcome == found


def test_a_lease_that_is_not_renewed_is_not_held(tmp_path: Path) -> None:
    root = write_training(tmp_path, healthy(), outcome="running")
    found = []
    for silent_s in (5.0, 59.0, 61.0, 3600.0):
        write_lease(root, silent_s)
        found.append(Training.read(Storage(), str(root)).outcome)
    assert found == ["running", "running", "left", "left"]
    for content in ("", "[]", '{"renewed_at": 7}', '{"renewed_at": "2026-01-01", "lease_s": 60}'):
        (root / "lease.json").write_text(content)
        assert Training.read(Storage(), str(root)).outcome == "left"


def test_foreign_text_is_escaped(tmp_path: Path) -> None:
    page = page_of(write_training(tmp_path, healthy(), facts={"manifest": "<script>x</script>"}))
    assert "<script>" not in page
    assert "&lt;script&gt;x" in page


def test_what_a_folder_is_is_found_out(tmp_path: Path) -> None:
    write_run(tmp_path / "evaluation", ["WEALY"], 2, optional=False)
    assert 'id="results"' in page_of(tmp_path / "evaluation")
    assert 'id="facts"' in page_of(write_training(tmp_path / "training", healthy()))
    (tmp_path / "other").mkdir()
    for name in ("other", "absent"):
        with pytest.raises(
            ConfigError, match=rf"{name} holds neither a training \(training\.json\) nor a finished"
        ):
            write_report(Storage(), str(tmp_path / name))
    assert not (tmp_path / "other" / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("training.json", "{", r"training\.json is no JSON"),
        ("history.json", "[{", r"history\.json is no JSON"),
        ("history.json", '[{"epoch": 1}]', r"history\.json is not what `wealy train` writes"),
        ("history.json", '{"epoch": 1}', r"history\.json is not what `wealy train` writes"),
        ("run.json", "", r"run\.json is no JSON"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, name: str, content: str, said: str) -> None:
    root = write_training(tmp_path, healthy())
    (root / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        write_report(Storage(), str(root))


def test_a_history_against_slow_loops() -> None:
    entries = curves(60, lambda s: 4 - 3 * s, lambda s: 0.5 - (s - 0.6) ** 2, every=4)
    history = History.of(entries)
    slow = []
    for i in range(60):  # 5 % of 60 epochs are 3: one on either side
        around = [entries[j]["loss"] for j in range(60) if abs(j - i) <= 1]
        slow.append(sum(around) / len(around))
    np.testing.assert_allclose(history.smoothed_loss, slow, rtol=1e-12)
    assert history.loss_at(17) == pytest.approx(slow[16])
    measured = [(e["epoch"], e["map"]) for e in entries if "map" in e]
    best = max(measured, key=lambda pair: pair[1])
    assert (history.measured[history.best], history.maps[history.best]) == best
    settled = next(epoch for epoch, ap in measured if ap >= 0.98 * best[1])
    assert history.measured[history.settled] == settled
    assert history.without_gain == len([epoch for epoch, _ in measured if epoch > best[0]])
    history = History.of([])
    assert (len(history), len(history.maps)) == (0, 0)


def test_chance_of_equal_cliques_is_that_of_the_evaluation(tmp_path: Path) -> None:
    counts = {"validation": {"tracks": 60, "cliques": 15, "dropped": 0}}
    training = Training.read(Storage(), str(write_training(tmp_path, healthy(), counts=counts)))
    rows = pa.table({"num_candidates": [59] * 60, "ranks": [[1, 2, 3]] * 60})
    assert training.chance == pytest.approx(expected_chance(rows), rel=1e-12)
    for odd in ({}, {"validation": {"tracks": 2, "cliques": 1, "dropped": 0}}):
        run = write_training(tmp_path, healthy(), counts=odd)
        assert Training.read(Storage(), str(run)).chance == (1.0 if odd else None)
