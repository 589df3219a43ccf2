"""What a peer is asked to do, and what it says about its run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One transcription of a list of songs, the same for every peer; travels as one JSON argument."""

    songs: list[str]
    """Paths of the audio files."""
    checkpoint: str
    """Folder with a Hugging Face Whisper, see `hf_checkpoint`."""
    out: str
    """Folder for the Parquet files."""
    batch: int
    """Windows per call of the model."""
    threads: int
    """Torch threads of the model."""
    max_tokens: int
    """Sampled tokens per window at most, EOT included."""
    language: str | None
    """Forced on every window; None: Hugging Face detects it for each window."""

    @property
    def calls(self) -> Path:
        """File with one line per call of the model: Unix time, and the number of windows."""
        return Path(f"{self.out}.calls.jsonl")

    def note_call(self, num_windows: int) -> None:
        """Note that a batch has reached the model."""
        with self.calls.open("a") as file:
            file.write(json.dumps({"at_s": time.time(), "windows": num_windows}) + "\n")

    def command(self, module: str) -> list[str]:
        """The command line that runs this job in a process of its own."""
        return [sys.executable, "-m", module, json.dumps(asdict(self))]


def main(run: Callable[[Job], None]) -> None:
    """Run the job of the command line; print when its work began and ended (Unix times) as JSON lines."""
    job = Job(**json.loads(sys.argv[1]))
    run(job)
    calls = [json.loads(line) for line in job.calls.read_text().splitlines()]
    ended_s = max(path.stat().st_mtime for path in Path(job.out).rglob("*.parquet"))
    print(json.dumps({"event": "first_batch", "at_s": calls[0]["at_s"]}))
    print(json.dumps({"event": "batches", "windows": [call["windows"] for call in calls]}))
    print(json.dumps({"event": "last_file", "at_s": ended_s}))
