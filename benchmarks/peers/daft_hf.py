"""Daft with Hugging Face's Whisper, after the audio transcription of Daft's own benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import daft
from daft import DataType, col

from benchmarks.peers.job import Job, main
from benchmarks.peers.transcriber import Transcriber, split_song

WINDOW = DataType.struct({"window": DataType.int64(), "samples": DataType.tensor(DataType.float32())})


@daft.func(return_dtype=WINDOW, unnest=True)
def windows_of(data: bytes) -> Iterator[dict[str, Any]]:
    """A song -> its windows."""
    for i, samples in enumerate(split_song(data)):
        yield {"window": i, "samples": samples}


def transcribe_class(batch: int) -> Any:
    """The class UDF; its batch size stands in a decorator."""

    @daft.cls(max_concurrency=1)
    class Transcribe(Transcriber):
        """One instance in a process that Daft starts."""

        @daft.method.batch(return_dtype=DataType.string(), batch_size=batch)
        def texts(self, samples: daft.Series) -> list[str]:
            """Windows -> texts."""
            return self.transcribe(samples.to_pylist())

    return Transcribe


def run(job: Job) -> None:
    """Songs -> texts in Parquet."""
    transcribe = transcribe_class(job.batch)(job)
    (
        daft.from_pydict({"path": job.songs})
        .with_column("data", col("path").download())
        .select("path", windows_of(col("data")))
        .select("path", "window", transcribe.texts(col("samples")).alias("text"))
        .write_parquet(job.out)
    )


if __name__ == "__main__":
    main(run)
