"""The run record `run.json`: what ran, with which settings and versions, and how it ended."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wealy_ray.errors import WealyError
from wealy_ray.storage import Storage

log = logging.getLogger(__name__)

PACKAGES = ("wealy-ray", "ray", "torch", "openai-whisper", "pyarrow", "numpy", "av", "s3fs")


class RunRecord:
    """Collects facts during a run; `write` replaces the file atomically, as often as there is news.

    Args:
        storage: Where it is written.
        uri: `<root>/runs/<run id>/run.json`.
        facts: Known at the start: recipe, manifest digest, extractor id, ...
    """

    def __init__(self, storage: Storage, uri: str, **facts: Any) -> None:
        self.storage, self.uri = storage, uri
        self.facts: dict[str, Any] = {
            "began_at": now(),
            "outcome": "running",
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            "git_commit": git_commit(),
            "hardware": {"host": platform.node(), "machine": platform.machine(), "cpus": os.cpu_count()},
            **facts,
        }

    def write(self, **facts: Any) -> None:
        """Adds facts and writes the file."""
        self.facts.update(facts)
        self.storage.write(self.uri, (json.dumps(self.facts, indent=2) + "\n").encode())

    def end(self, error: BaseException | None, **facts: Any) -> None:
        """Notes how a run ended, in its last words: a storage that is gone is not waited for, faults are only logged.

        Args:
            error: What it ended with; None: it is done.
            **facts: Numbers of the run.
        """
        outcome: dict[str, Any] = {"outcome": "done", "exit_code": 0}
        if isinstance(error, WealyError):
            outcome = {"outcome": type(error).__name__, "exit_code": error.exit_code, "error": str(error)}
        elif error is not None:
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
            outcome = {"outcome": type(error).__name__, "exit_code": code}
        self.storage = self.storage.impatient()
        try:
            self.write(ended_at=now(), **outcome, **facts)
        except WealyError as e:
            log.warning("the run record could not be written: %s", e)


def new_run_id() -> str:
    """Names a run; later ones sort behind."""
    return f"{now().replace(':', '')}-{uuid.uuid4().hex[:6]}"


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with `+changes` when it is not clean; else None."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
