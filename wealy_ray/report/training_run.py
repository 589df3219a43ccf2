"""A training's folder as it is at this moment: done, at work, failed or left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wealy_ray.errors import ConfigError
from wealy_ray.report.history import History
from wealy_ray.storage import ObjectMissingError, Storage, join
from wealy_ray.store.lease import is_held

MARKER = "training.json"
"""The file by which a folder is known for a training's; written before anything else."""


@dataclass(frozen=True, eq=False)
class Training:
    """What its files say.

    Attributes:
        facts: `training.json`: what is trained on what, the same for all runs that worked on it.
        record: `run.json` of the last run; empty where there is none.
        history: Epochs that are done.
        config: `model/config.json`; None before the end.
        is_held: Whether a driver seems to be at work.
    """

    facts: Mapping[str, Any]
    record: Mapping[str, Any]
    history: History
    config: Mapping[str, Any] | None
    is_held: bool

    @classmethod
    def read(cls, storage: Storage, run: str) -> Training:
        """Reads a folder.

        Raises:
            ConfigError: It holds no training, or a file of it is damaged.
        """
        facts = _read_json(storage, join(run, MARKER))
        if facts is None:
            raise ConfigError(f"{run} holds no training (no {MARKER}); run `wealy train` first")
        uri = join(run, "history.json")
        try:
            history = History.of(_read_json(storage, uri) or [])
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"{uri} is not what `wealy train` writes; run the training again") from e
        record = _read_json(storage, join(run, "run.json")) or {}
        config = _read_json(storage, join(run, "model", "config.json"))
        return cls(facts, record, history, config, is_held(storage, run))

    @property
    def outcome(self) -> str:
        """`done`, `running`, `left` (nobody is at work and nobody said why), or the class of an error."""
        outcome = str(self.record.get("outcome", "running"))
        if self.config is not None and outcome != "ReconciliationError":
            return "done"  # the model is written last, whatever happened to its writer then
        if outcome in ("running", "done"):
            return "running" if self.is_held else "left"
        return outcome

    @property
    def epochs(self) -> int:
        """Epochs that the recipe asks for."""
        return int(self.facts["optimiser"]["epochs"])

    def counts(self, split: str) -> Mapping[str, int]:
        """Tracks, cliques and dropped tracks of `train` or `validation`; empty where nobody has counted."""
        found: Mapping[str, int] = (self.record.get("counts") or {}).get(split) or {}
        return found

    @property
    def languages(self) -> dict[str, int]:
        """Training tracks by language, most first; empty before the end."""
        found = ((self.config or {}).get("data") or {}).get("languages") or {}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @property
    def chance(self) -> float | None:
        """About the validation MAP of a random order: as if all cliques were of one size."""
        counts = self.counts("validation")
        if not counts.get("cliques"):
            return None
        others = counts["tracks"] - 1
        relevant = min(others, max(1.0, counts["tracks"] / counts["cliques"] - 1))
        harmonic = sum(1 / n for n in range(1, others + 1))
        return (harmonic + (relevant - 1) / max(1, others - 1) * (others - harmonic)) / others


def _read_json(storage: Storage, uri: str) -> Any:
    try:
        return json.loads(storage.read(uri))
    except ObjectMissingError:
        return None
    except ValueError as e:
        raise ConfigError(f"{uri} is no JSON ({e}); run the training again") from e
