"""Plain Ray Data with Hugging Face's Whisper, after the audio example of Ray's documentation.

There (`ray-overview/examples/e2e-audio`) features, model and tokenizer are three stages. On a machine without
a GPU they would only hand arrays to one another, so they are one actor here: the cheapest for this peer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
import ray.data

from benchmarks.peers.job import Job, main
from benchmarks.peers.transcriber import Transcriber, split_song

# Ray Data wants a CPU for each stage and two for this model: with the machine's own two nothing would start.
LEAST_CPUS = 8


def windows_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A song -> its windows."""
    for i, samples in enumerate(split_song(row["bytes"])):
        yield {"path": row["path"], "window": i, "samples": samples}


class Transcribe(Transcriber):
    """The actor of `map_batches`."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Windows -> texts."""
        texts = self.transcribe(list(batch["samples"]))
        return {"path": batch["path"], "window": batch["window"], "text": texts}


def run(job: Job) -> None:
    """Songs -> texts in Parquet."""
    ray.init(
        address="local",
        num_cpus=max(LEAST_CPUS, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.WARNING,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    (
        ray.data.read_binary_files(job.songs, include_paths=True)
        .flat_map(windows_of)
        .map_batches(
            Transcribe,
            fn_constructor_kwargs={"job": job},
            batch_size=job.batch,
            num_cpus=job.threads,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .write_parquet(job.out)
    )


if __name__ == "__main__":
    main(run)
