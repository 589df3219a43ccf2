"""Curves for those who watch: TensorBoard, and MLflow or W&B where they are installed."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from wealy_ray.errors import ConfigError
from wealy_ray.storage import Storage, join


class Tracker(Protocol):
    """Is given numbers by epoch."""

    def log(self, entry: dict[str, float]) -> None:
        """Takes one epoch's numbers; `epoch` is one of them."""
        ...

    def flush(self) -> None:
        """Makes sure that what was taken is kept."""
        ...


class TensorBoard:
    """Event files in `<out>/tensorboard`, on any storage: written on local disk, copied whenever they are flushed.

    Args:
        storage: Access.
        out: Folder of the run.
        first_epoch: What an earlier process has written from here on does not count any more.
    """

    def __init__(self, storage: Storage, out: str, first_epoch: int) -> None:
        # not SummaryWriter, whose `flush` does not wait for what its thread has yet to write
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.storage, self.uri = storage, join(out, "tensorboard")
        self._folder = tempfile.TemporaryDirectory()
        # named by the second and the host otherwise: a quick restart would overwrite
        suffix = f".{uuid.uuid4().hex[:8]}"
        self._writer = EventsWriter(str(Path(self._folder.name) / "events"), suffix)
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=first_epoch + 1, session_log=start, wall_time=time.time()))

    def log(self, entry: dict[str, float]) -> None:
        """See `Tracker`."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in _values(entry).items():
            event = Event(step=int(entry["epoch"]), summary=scalar(name, value), wall_time=time.time())
            self._writer.write_event(event)

    def flush(self) -> None:
        """See `Tracker`."""
        self._writer.flush()
        for file in Path(self._folder.name).iterdir():
            self.storage.write(join(self.uri, file.name), file.read_bytes())


class MLflow:
    """A run of MLflow, at the tracking server that MLFLOW_TRACKING_URI names; a run that goes on stays the same run."""

    def __init__(self, recipe: dict[str, Any], storage: Storage, out: str) -> None:
        self._mlflow = _imported("mlflow")
        kept = _Note(storage, join(out, "mlflow-run.txt"))
        run = self._mlflow.start_run(run_id=kept.read(), run_name=os.path.basename(out.rstrip("/")))
        if kept.read() is None:
            kept.write(run.info.run_id)
            self._mlflow.log_dict(recipe, "recipe.json")

    def log(self, entry: dict[str, float]) -> None:
        """See `Tracker`."""
        self._mlflow.log_metrics(_values(entry), step=int(entry["epoch"]))

    def flush(self) -> None:
        """Nothing is held back."""


class WandB:
    """A run of Weights & Biases, by the WANDB_* variables; a run that goes on stays the same run."""

    def __init__(self, recipe: dict[str, Any], storage: Storage, out: str) -> None:
        wandb = _imported("wandb")
        kept = _Note(storage, join(out, "wandb-run.txt"))
        self._run = wandb.init(
            id=kept.read(), resume="allow", config=recipe, name=os.path.basename(out.rstrip("/"))
        )
        kept.write(self._run.id)

    def log(self, entry: dict[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(_values(entry), step=int(entry["epoch"]))

    def flush(self) -> None:
        """Nothing is held back."""


def build_trackers(
    names: Sequence[str], recipe: dict[str, Any], storage: Storage, out: str, first_epoch: int
) -> list[Tracker]:
    """Trackers by name: `tensorboard`, `mlflow`, `wandb`.

    Raises:
        ConfigError: One is not installed.
    """
    built: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            built.append(TensorBoard(storage, out, first_epoch))
        else:
            built.append(MLflow(recipe, storage, out) if name == "mlflow" else WandB(recipe, storage, out))
    return built


class _Note:
    """A short text in the run's folder."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self.storage, self.uri = storage, uri

    def read(self) -> str | None:
        return self.storage.read(self.uri).decode() if self.storage.exists(self.uri) else None

    def write(self, text: str) -> None:
        self.storage.write(self.uri, text.encode())


def _values(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "epoch"}


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(
            f"tracking by {name} needs it: pip install {name}; or take it out of `tracking`"
        ) from e
