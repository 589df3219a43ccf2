"""Independent windows: ours and its peers on the same ones, part by part."""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.parts.inputs import Weights, pcm_windows
from benchmarks.parts.measure import Timings, agreement, profile
from benchmarks.parts.roofline import rooflines
from benchmarks.peers import Contender, Decoded, Setting, choose, log_mels
from benchmarks.peers.ours import Ours
from wealy_ray.whisper import DecodeOptions, Engine, EngineOptions, EngineStats


def run(arguments: argparse.Namespace, weights: Weights) -> dict:
    """Measure all contenders; the report for the JSON."""
    peers, left_out = choose(arguments.peers, has_ct2_folder=weights.ct2_folder is not None)
    options = DecodeOptions(timestamps=arguments.timestamps, max_tokens=arguments.max_tokens)
    engine = Engine(weights.model, engine_options(arguments), options)
    with engine, torch.no_grad():
        engine.wait_until_ready()
        setting = make_setting(arguments, weights, engine)
        ours = Ours(setting, engine)
        contenders = {"ours": ours, **{name: peer.make(setting) for name, peer in peers.items()}}
        if setting.device.type == "cuda":
            warm_up(contenders)
        timings = Timings(len(setting.pcm), setting.device)
        results, decoder_rounds, whole_rounds = measure(arguments.rounds, timings, contenders)
        if arguments.profile:
            profile(ours.whole, arguments.profile)
    reference = "stock_one_by_one" if "stock_one_by_one" in results else "ours"
    medians = {part: timings.wall_median_s(part) for part in ("encoder_ours", "decoder_ours", "whole_ours")}
    return {
        "settings": {
            "weights_digest": weights.digest,
            "device": str(setting.device),
            "dtype": str(setting.dtype),
            "windows": len(setting.pcm),
            "languages": sorted(set(setting.languages)),
            "mean_tokens": statistics.mean(len(tokens) for tokens, _ in results["ours"]),
        },
        **timings.report(),
        "left_out": left_out,
        "agreement": {
            "reference": reference,
            **{
                name: agreement(result, results[reference])
                for name, result in results.items()
                if name != reference
            },
        },
        "slot_utilisation": {
            "decoder": statistics.median(stats.utilisation for stats in decoder_rounds),
            "whole": statistics.median(stats.utilisation for stats in whole_rounds),
        },
        "roofline": rooflines(
            weights.model.dims,
            setting.dtype,
            num_windows=len(setting.pcm),
            seconds_per_window=medians,
            decoder_rounds=decoder_rounds,
            peak_tflops=arguments.peak_tflops,
            peak_tbps=arguments.peak_tbps,
        ),
    }


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        device=arguments.device,
        dtype=arguments.dtype,
        num_slots=arguments.slots,
        encoder_batch=arguments.encoder_batch,
    )


def make_setting(arguments: argparse.Namespace, weights: Weights, engine: Engine) -> Setting:
    """Prepare what all contenders start from. Languages are detected by the engine, if at all."""
    model = weights.model.to(engine.device)
    pcm = pcm_windows(arguments.songs, arguments.windows)
    mels = log_mels(pcm, model)
    languages = ["en"] * len(pcm)
    if engine.detects_language and not weights.are_random:
        languages = [future.language.result().code for future in [engine.submit(mel) for mel in mels]]
    return Setting(
        model=model,
        vocabulary=engine.vocabulary,
        options=engine.decode,
        device=engine.device,
        dtype=engine.dtype,
        batch=arguments.slots,
        threads=arguments.threads,
        ct2_folder=weights.ct2_folder,
        pcm=pcm,
        languages=languages,
        mels=mels,
        features=[model.encoder(mel[None].to(engine.dtype))[0] for mel in mels],
    )


def warm_up(contenders: dict[str, Contender]) -> None:
    """One round without a clock: kernels are loaded, memory is allocated."""
    contenders["ours"].encoder()
    for contender in contenders.values():
        contender.decoder()
        contender.whole()


def measure(
    rounds: int, timings: Timings, contenders: dict[str, Contender]
) -> tuple[dict[str, Decoded], list[EngineStats], list[EngineStats]]:
    """Run all rounds.

    Returns:
        Each contender's last results from features, and what the engine counted in each round of the parts
        "decoder" and "whole".
    """
    results: dict[str, Decoded] = {}
    counted: dict[str, list[EngineStats]] = {"decoder": [], "whole": []}
    ours = contenders["ours"]
    for _ in range(rounds):
        timings.run("encoder_ours", ours.encoder)
        ours.take_stats()
        for name, contender in contenders.items():
            for part, work in (("decoder", contender.decoder), ("whole", contender.whole)):
                decoded = timings.run(f"{part}_{name}", work)
                if part == "decoder":
                    results[name] = decoded
                if contender is ours:
                    counted[part].append(ours.take_stats())
    return results, counted["decoder"], counted["whole"]
