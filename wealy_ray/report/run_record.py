"""The run record `run.json`: what ran, with which settings and versions, and how it ended."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wealy_ray.storage import Storage

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
