"""`wealy report`: finds out what a folder holds, and writes its page."""

from __future__ import annotations

from wealy_ray.errors import ConfigError
from wealy_ray.report import evaluation, training, training_run
from wealy_ray.storage import Storage, join


def write_report(storage: Storage, run: str) -> str:
    """Writes `report.html` and `figures/*.png` into a run's folder.

    Args:
        storage: Access.
        run: The `out` of a training or of an evaluation.

    Returns:
        The page's URI.

    Raises:
        ConfigError: The folder is neither, or not a whole one.
    """
    if storage.exists(join(run, training_run.MARKER)):
        return training.write_report(storage, run)
    if storage.exists(join(run, evaluation.MARKER)):
        return evaluation.write_report(storage, run)
    raise ConfigError(
        f"{run} holds neither a training ({training_run.MARKER}) nor a finished evaluation ({evaluation.MARKER}); give "
        "the `out` of a recipe that `wealy train` or `wealy evaluate` has run"
    )
