"""Command line of the song generator: `python -m examples.song_generator training-songs --out FOLDER`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from examples.song_generator.making import make_songs
from examples.song_generator.plan import PRESETS, plan_songs
from wealy_ray.errors import WealyError


def main(arguments: list[str] | None = None) -> int:
    """Makes a preset's songs; returns the exit code (see docs/exit-codes.md)."""
    parser = argparse.ArgumentParser(prog="python -m examples.song_generator", description="Make songs.")
    parser.add_argument("preset", choices=PRESETS, help="which songs")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="for audio/ and manifest.jsonl"
    )
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one per CPU"
    )
    args = parser.parse_args(arguments)
    if args.processes < 1:
        parser.error("--processes must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped job ends like Ctrl-C
    try:
        print(make_songs(plan_songs(PRESETS[args.preset]), args.out, args.processes))
    except WealyError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished songs are saved, run the same command again to go on", file=sys.stderr)
        return 130
    finally:
        for process in multiprocessing.active_children():  # after an error: nobody wants their songs
            process.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
