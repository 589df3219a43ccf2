"""The report of a training, at any time: of one that is done, at work, or has failed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from wealy_ray.progress import in_words
from wealy_ray.report import training_figures as figures
from wealy_ray.report.history import History
from wealy_ray.report.page import Drawing, write_page
from wealy_ray.report.tables import counts_in_words
from wealy_ray.report.training_diagnostics import diagnose_training
from wealy_ray.report.training_run import Training
from wealy_ray.storage import Storage

MAX_LANGUAGES = 12
STATES = {
    "done": "Done after {done} of at most {epochs} epochs.",
    "running": "At work: {done} of {epochs} epochs are done.",
    "left": "Not done, and nobody is at work on it: {done} of {epochs} epochs.",
}


def write_report(storage: Storage, run: str) -> str:
    """Writes `report.html` and `figures/*.png` into a training's folder.

    Args:
        storage: Access.
        run: The training's folder (its recipe's `out`).

    Returns:
        The page's URI.

    Raises:
        ConfigError: The folder holds no training, or a file of it is damaged.
    """
    training = Training.read(storage, run)
    history = training.history
    state = STATES.get(training.outcome, "Ended as {outcome} after {done} of {epochs} epochs.")
    return write_page(
        storage,
        run,
        "training.html.j2",
        title="Training " + "/".join(run.rstrip("/").split("/")[-2:]),
        findings=diagnose_training(training),
        sections={"curves": list(_draw_curves(training))},
        state=state.format(outcome=training.outcome, done=f"{len(history):,}", epochs=f"{training.epochs:,}"),
        history=history,
        chance=training.chance,
        tables=[(title, _kept(rows)) for title, rows in _tables(training)],
        epochs=list(_epochs(history)),
        model=f"{run.rstrip('/')}/model" if training.config else None,
    )


def _draw_curves(training: Training) -> Iterator[Drawing]:
    history = training.history
    if not len(history):
        return
    said = f"The loss went from {history.loss[0]:.4g} to {history.loss[-1]:.4g} in {len(history):,} epochs."
    yield Drawing("loss", "Loss", said, figures.loss_curve(history))
    if len(history.maps):
        said = (
            f"Validation MAP is {history.maps[history.best]:.3f} at best, in epoch {history.measured[history.best]}, "
            f"and {history.maps[-1]:.3f} in epoch {history.measured[-1]}."
        )
        yield Drawing("validation_map", "Validation MAP", said, figures.map_curve(history, training.chance))
    most = int(np.argmax(history.learning_rate))
    said = f"The learning rate is {history.learning_rate[most]:.3g} at most, in epoch {history.epochs[most]}."
    yield Drawing("learning_rate", "Learning rate", said, figures.rate_curve(history))
    norms = history.gradient_norm
    said = (
        f"Norm of the gradients: median {np.median(norms):.3g}, from {norms.min():.3g} to {norms.max():.3g}."
    )
    curve = figures.norm_curve(history, float(training.facts["optimiser"]["clip"]))
    yield Drawing("gradient_norm", "Norm of the gradients", said, curve)


def _tables(training: Training) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name-value rows by title."""
    facts, record = training.facts, training.record
    recipe, data = record.get("recipe") or {}, facts["data"]
    fed, of_them = _fed(data)
    yield (
        "Data",
        [
            ("training", _counted(data["train_split"], training.counts("train"))),
            ("validation", _counted(data["validation_split"], training.counts("validation"))),
            ("languages (training tracks)", _languages(training.languages)),
            ("manifest", _words(recipe.get("manifest"))),
            ("store", _words(recipe.get("store"))),
            ("extractor, index", f"{facts['extractor_id']}, {facts['index']}"),
            (fed, of_them),
            ("crop", f"{data['crop']:,} {fed}; validation on {data['validate_on']}"),
        ],
    )
    parameters = record.get("parameters")
    yield (
        "Model",
        [
            ("network", _settings(facts["model"])),
            ("weights", f"{parameters:,}" if parameters else ""),
            ("digest", _words((training.config or {}).get("digest"))),
        ],
    )
    yield (
        "Training",
        [
            ("loss", _settings(facts["loss"])),
            ("batch", f"{data['cliques_per_batch']} cliques x {data['versions_per_clique']} versions"),
            ("epoch by", _words(data["epoch_by"])),
            ("negatives", {"all": "of all workers", "none": "of the own worker"}[facts["gather"]]),
            ("mining", _settings(facts["mining"]) if facts["mining"] else ""),
            ("optimiser", _settings(facts["optimiser"])),
            ("validation", _settings(facts["validation"])),
            ("seed", _words(facts["seed"])),
        ],
    )
    yield "Last run", list(_run_rows(record))


def _run_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of the last run alone: a training may have been stopped and gone on."""
    yield "began", _words(record.get("began_at"))
    yield "ended", _words(record.get("ended_at"))
    wall_s, speed, waited = (record.get(name) for name in ("wall_s", "tracks_per_s", "waited_share"))
    yield "time", in_words(wall_s) if wall_s else ""
    yield "workers", _words(record.get("workers"))
    yield "speed", f"{speed:,.1f} tracks/s" if speed else ""
    yield "waiting for data", f"{waited:.1%} of the time" if waited is not None else ""
    hardware = record.get("hardware") or {}
    yield "host", f"{hardware['host']}, {hardware['cpus']} CPUs" if hardware else ""
    yield (
        "versions",
        ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items()),
    )
    yield "commit", _words(record.get("git_commit"))


def _epochs(history: History) -> Iterator[dict[str, Any]]:
    """Epochs of the table: those that were measured, and the last one; all where none was."""
    maps = dict(zip(history.measured.tolist(), history.maps.tolist(), strict=True))
    best = history.measured[history.best] if maps else None
    for i, epoch in enumerate(history.epochs.tolist()):
        if not maps or epoch in maps or i == len(history) - 1:
            yield {
                "epoch": epoch,
                "loss": history.loss[i],
                "map": maps.get(epoch),
                "learning_rate": history.learning_rate[i],
                "gradient_norm": history.gradient_norm[i],
                "padded_share": history.padded_share[i],
                "is_best": epoch == best,
            }


def _kept(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in rows if value]


def _counted(split: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return f"split {split}"
    dropped = (
        f"; {counts['dropped']:,} tracks with nothing to learn from left out" if counts.get("dropped") else ""
    )
    return f"split {split}: {counts['tracks']:,} tracks, {counts['cliques']:,} cliques{dropped}"


def _languages(languages: Mapping[str, int]) -> str:
    shown = {name or "unknown": n for name, n in list(languages.items())[:MAX_LANGUAGES]}
    more = len(languages) - len(shown)
    return counts_in_words(shown) + (f", and {more} more" if more else "")


def _fed(data: Mapping[str, Any]) -> tuple[str, str]:
    """What the network is fed."""
    if data.get("sentences"):
        return "sentences", f"as vectors of {data['sentences']}"
    kinds = data["kinds"]
    return "states", "that predict " + ", ".join(kinds) if kinds else "of all kinds"


def _settings(settings: Mapping[str, Any]) -> str:
    """`transformer; width 768; layers 4`."""
    first = [str(settings["kind"])] if "kind" in settings else []
    others = (f"{name.replace('_', ' ')} {_words(v)}" for name, v in settings.items() if name != "kind")
    return "; ".join([*first, *others])


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
