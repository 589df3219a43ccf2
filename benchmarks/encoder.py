"""What was tried to make Whisper's encoder faster on the CPU.

Variants alternate, round by round; figures are medians in seconds per window, and the largest relative L2 of a
window's features against float32 in batches of one. Every variant runs openai-whisper's encoder with --threads
threads, but for those whose name says otherwise.

    python benchmarks/encoder.py --windows 8 --rounds 5 --threads 2 --out runs/bench/encoder.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from torch import nn

from benchmarks.parts.inputs import REPOSITORY, load, pcm_windows
from benchmarks.parts.measure import SETTLE_S
from benchmarks.parts.variants import InProcess, InWorkers, Variant
from benchmarks.parts.workers import WorkerOptions, environment
from benchmarks.peers import log_mels
from wealy_ray.errors import WealyError
from wealy_ray.whisper.backend import Backend
from wealy_ray.whisper.encoder import prepared_encoder


def makers(arguments: argparse.Namespace) -> dict[str, Callable[[], Variant]]:
    """How to make each variant; `fp32` is what the others are compared with."""
    model = load(arguments.weights, arguments.model).model
    mels = log_mels(pcm_windows(arguments.songs, arguments.windows), model)
    threads = arguments.threads
    options = partial(WorkerOptions, arguments.weights, arguments.model)
    here = partial(InProcess, model.encoder, mels, threads=threads)
    half = partial(InProcess, bfloat16(model.encoder), [mel.bfloat16() for mel in mels], threads=threads)
    cpus = sorted(os.sched_getaffinity(0))

    def compiled(**config: bool) -> Variant:
        # Given twice: as options, so that nothing compiled without them is taken; for dynamo, which asks here.
        # The folder is empty, so that compiling is timed and not an earlier run's cache.
        with (
            torch._inductor.config.patch(**config),
            tempfile.TemporaryDirectory() as folder,
            environment({"TORCHINDUCTOR_CACHE_DIR": folder}),
        ):
            encoder = torch.compile(copy.deepcopy(model.encoder), options=config)
            return InProcess(encoder, mels, threads=threads, is_compiled=True)

    def prepared(dtype: torch.dtype) -> Variant:
        """What the engine runs: linear maps and attention through oneDNN."""
        encoder = prepared_encoder(model.encoder, Backend(), dtype, model.dims.n_audio_ctx)
        return InProcess(encoder, [mel.to(dtype) for mel in mels], threads=threads)

    def workers(*chosen: WorkerOptions) -> Variant:
        return InWorkers(list(chosen), mels)

    return {
        "fp32": here,
        **{f"batch_{batch}": partial(here, batch=batch) for batch in (2, 4, 8)},
        "threads_1": partial(here, threads=1),
        "mkldnn_off": partial(here, context=partial(torch.backends.mkldnn.flags, enabled=False)),
        "bfloat16": half,
        "bfloat16_batch_4": partial(half, batch=4),
        "engine": partial(prepared, torch.float32),
        "engine_bfloat16": partial(prepared, torch.bfloat16),
        "compiled": compiled,
        "compiled_frozen": partial(compiled, freezing=True),
        "worker": partial(workers, options(threads)),
        "pinned": partial(workers, options(threads, cpus=frozenset(cpus[:threads]))),
        "omp_close": partial(
            workers, options(threads, environment={"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"})
        ),
        "flush_denormal": partial(workers, options(threads, flush_denormal=True)),
        "two_threads": partial(here, threads=1, python_threads=2),
        "two_processes": partial(workers, options(1), options(1)),
        "two_processes_pinned": partial(
            workers, *(options(1, cpus=frozenset({cpus[index % len(cpus)]})) for index in range(2))
        ),
    }


def bfloat16(encoder: nn.Module) -> nn.Module:
    """A copy with linear and convolution weights in bfloat16, as the engine casts it."""
    encoder = copy.deepcopy(encoder)
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.to(torch.bfloat16)
    return encoder


def make(chosen: dict[str, Callable[[], Variant]]) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variants, and why others cannot be made here (no compiler, say)."""
    variants, failed = {}, {}
    for name, maker in chosen.items():
        try:
            variants[name] = maker()
        except (RuntimeError, OSError, EOFError) as error:
            failed[name] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
    return variants, failed


def run(arguments: argparse.Namespace) -> dict:
    """Measure the variants; the report for the JSON."""
    known = makers(arguments)
    names = list(known) if arguments.variants is None else ["fp32", *arguments.variants.split(",")]
    for name in names:
        if name not in known:
            raise SystemExit(f"error: no variant is called {name!r}; valid are {', '.join(known)}")
    variants, failed = make({name: known[name] for name in dict.fromkeys(names)})
    rounds: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant.encode()
    for _ in range(arguments.rounds):
        for name, variant in variants.items():
            time.sleep(SETTLE_S)
            started = time.perf_counter()
            variant.encode()
            rounds[name].append((time.perf_counter() - started) / arguments.windows)
    medians = {name: statistics.median(taken) for name, taken in rounds.items()}
    reference = variants["fp32"].features()
    report = {
        name: {
            "seconds_per_window": medians[name],
            "speedup_over_fp32": medians["fp32"] / medians[name],
            "relative_l2": largest_relative_l2(variant.features(), reference),
            "compile_s": variant.compile_s,
            "rounds": rounds[name],
        }
        for name, variant in variants.items()
    }
    for variant in variants.values():
        variant.close()
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "settings": {**vars(arguments), "torch": torch.__version__, "cpu_capability": capability},
        "variants": report,
        "failed": failed,
    }


def largest_relative_l2(features: list[np.ndarray], reference: list[np.ndarray]) -> float:
    pairs = zip(features, reference, strict=True)
    return max(float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)) for mine, theirs in pairs)


def main() -> int:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", help="`random`, or as load_whisper takes it; default: the packaged base")
    parser.add_argument("--model", default="base", help="shape of random weights")
    parser.add_argument("--songs", type=Path, default=REPOSITORY / "examples" / "songs")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variants", help="comma list; default: all. fp32 always runs")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    arguments = parser.parse_args()
    try:
        text = json.dumps(run(arguments), indent=2, default=str)
    except WealyError as error:
        raise SystemExit(f"error: {error}") from error
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
