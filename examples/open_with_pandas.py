"""Opens the newest index and one shard of a store with pandas alone, to show that they are plain files."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd


def main(store: str) -> None:
    """Prints the index of a store and the first states of one track.

    Args:
        store: A local store with one extractor.
    """
    root = next(path.parent for path in Path(store).glob("*/extractor.json"))
    newest = max((root / "index").glob("*.parquet"), key=lambda path: int(path.stem))
    index = pd.read_parquet(newest)
    print(f"\npandas.read_parquet('{newest}')")
    columns = ["track_id", "status", "language", "duration_s", "num_states", "dim", "shard"]
    print(index[columns].head(8).to_string(index=False, max_colwidth=16))

    shard = root / "shards" / index[index["status"] == "ok"].iloc[0]["shard"]
    row = pd.read_parquet(shard).iloc[0]
    states = np.frombuffer(row["states"], np.float16).reshape(row["num_states"], row["dim"])
    print(f"\npandas.read_parquet('{shard}')")
    print(f"track {row['track_id']}: {row['text'][:90]!r}")
    print(f"states {states.shape} {states.dtype}, first: {np.array2string(states[0, :6], precision=3)} ...")


if __name__ == "__main__":
    main(sys.argv[1])
