"""Entry point for `ray job submit`: states -> vectors by a trained model.

ray job submit --working-dir . -- python jobs/embed.py recipes/demo-embed.yaml [key.subkey=value ...]

The job's exit status and `ray job logs` carry the same code and sentence as `wealy embed`.
"""

import sys

from wealy_ray.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
