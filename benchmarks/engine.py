"""Our engine against its peers on the same windows: openai-whisper, transformers, CTranslate2.

Contenders alternate within one process, round by round; figures are medians over the rounds, in seconds per
30 s window: of the wall clock, and of the process's CPU time, which other programs on the machine disturb less.
"Decoder" is decoding from given encoder features; "whole" adds log-mel and encoder from PCM. All are greedy, with
the same start tokens, suppressed tokens and token budget.

    python benchmarks/engine.py --windows 32 --rounds 3 --threads 2 --out runs/bench/engine.json
    python benchmarks/engine.py --plan reference --out runs/bench/reference.json
    python benchmarks/engine.py --device cuda --weights random --model turbo --slots 128 --windows 512 \
        --max-tokens 96 --out runs/bench/turbo.json --profile runs/bench/turbo.txt

Peers: stock_one_by_one, stock_batched (together `stock`), hf_batched, hf_direct (together `hf`), ctranslate2.
With `--weights random` no window ends before --max-tokens, for any contender. Plan `reference` compares whole songs
with `whisper.transcribe` instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from benchmarks.parts import fixed_plan, reference_plan
from benchmarks.parts.inputs import REPOSITORY, SHAPES, load
from wealy_ray.errors import WealyError

H200_TFLOPS, H200_TBPS = 790.0, 4.3  # measured: bf16 matrix product, copy within the device


def read_arguments() -> argparse.Namespace:
    """Parse the command line and fill in what depends on other options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", default="fixed", choices=["fixed", "reference"])
    parser.add_argument("--weights", help="`random`, or as load_whisper takes it; default: the packaged base")
    parser.add_argument("--model", choices=sorted(SHAPES), help="shape of random weights; default: base")
    parser.add_argument("--peers", help="comma list; default: all that can be imported")
    parser.add_argument(
        "--songs", type=Path, help="folder; default: the sample songs, noise if --weights random"
    )
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16, help="also the peers' batch")
    parser.add_argument("--encoder-batch", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    parser.add_argument("--max-tokens", type=int, default=224)
    parser.add_argument(
        "--timestamps", action=argparse.BooleanOptionalAction, help="default: on, but not random"
    )
    parser.add_argument("--peak-tflops", type=float, help=f"default on a GPU: {H200_TFLOPS} (H200, bf16)")
    parser.add_argument("--peak-tbps", type=float, help=f"default on a GPU: {H200_TBPS} (H200)")
    parser.add_argument("--profile", type=Path, help="GPU only: write the table of the longest kernels here")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    arguments = parser.parse_args()
    is_random = arguments.weights == "random"
    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    if is_random and (arguments.timestamps or arguments.plan == "reference"):
        parser.error(
            "--weights random excludes --timestamps and --plan reference: windows must not end early"
        )
    if arguments.model and not is_random:
        parser.error("--model is the shape of random weights; name other weights with --weights")
    if arguments.plan == "reference" and arguments.timestamps is False:
        parser.error("--plan reference needs timestamps")
    if arguments.profile and (not on_gpu or arguments.plan == "reference"):
        parser.error("--profile needs a GPU and --plan fixed")
    if arguments.timestamps is None:
        arguments.timestamps = not is_random
    if arguments.songs is None and not is_random:
        arguments.songs = REPOSITORY / "examples" / "songs"
    if on_gpu:
        arguments.peak_tflops = arguments.peak_tflops or H200_TFLOPS
        arguments.peak_tbps = arguments.peak_tbps or H200_TBPS
    arguments.model = arguments.model or "base"
    return arguments


def versions() -> dict[str, str]:
    """Of the contenders' libraries, where they are installed."""
    names = ("torch", "openai-whisper", "transformers", "ctranslate2")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Run one plan and write its JSON."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    plan = {"fixed": fixed_plan, "reference": reference_plan}[arguments.plan]
    try:
        report = plan.run(arguments, load(arguments.weights, arguments.model))
    except WealyError as error:
        raise SystemExit(f"error: {error}") from error
    report["settings"] = {**vars(arguments), "versions": versions(), **report["settings"]}
    text = json.dumps(report, indent=2, default=str)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
