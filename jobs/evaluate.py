"""Entry point for `ray job submit`: states or vectors -> exact retrieval metrics.

ray job submit --working-dir . -- python jobs/evaluate.py recipes/demo-evaluate.yaml [key.subkey=value ...]

The job's exit status and `ray job logs` carry the same code and sentence as `wealy evaluate`.
"""

import sys

from wealy_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
