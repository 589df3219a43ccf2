"""Entry point for `ray job submit`: shards of decoder states -> a model.

ray job submit --working-dir . -- python jobs/train.py recipes/demo-train.yaml [key.subkey=value ...]

The job's exit status and `ray job logs` carry the same code and sentence as `wealy train`.
"""

import sys

from wealy_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
