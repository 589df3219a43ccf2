"""Entry point for `ray job submit`: audio -> shards of decoder states.

ray job submit --working-dir . -- python jobs/extract.py recipes/demo.yaml [key.subkey=value ...]

The job's exit status and `ray job logs` carry the same code and sentence as `wealy extract`.
"""

import sys

from wealy_ray.cli import main

if __name__ == "__main__":
    main(["extract", *sys.argv[1:]])
