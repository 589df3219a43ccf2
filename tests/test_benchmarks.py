"""A short smoke: the benchmarks run and their JSON holds what the documents quote."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import whisper

from tests.pipelines.support import REPOSITORY, environment
from wealy_ray.audio import BytesSource, decode
from wealy_ray.whisper import load_whisper
from wealy_ray.whisper.packaged import assemble_base


def run(script: str, *arguments: str, out: Path) -> dict:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments, "--out", str(out)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def run_engine(*arguments: str, out: Path) -> dict:
    small = "--weights random-tiny --windows 3 --slots 2 --rounds 1 --max-tokens 4 --device cpu"
    return run("engine.py", *small.split(), *arguments, out=out)


def test_engine_benchmark(tmp_path: Path) -> None:
    result = run_engine("--peers", "stock", out=tmp_path / "engine.json")
    assert result["agreement"]["reference"] == "stock_one_by_one"
    assert result["agreement"]["ours"]["tokens_equal_share"] == 1.0
    assert result["agreement"]["ours"]["states_relative_l2_max"] < 2e-5
    assert result["wall"]["speedup"]["decoder_over_stock_one_by_one"] > 0
    assert result["wall"]["speedup"]["whole_over_stock_batched"] > 0
    assert 0 < result["slot_utilisation"]["decoder"] <= 1


@pytest.mark.parametrize("timestamps", ["--timestamps", "--no-timestamps"])
def test_hugging_face_has_the_same_weights_and_rules(tmp_path: Path, timestamps: str) -> None:
    pytest.importorskip("transformers")
    result = run_engine("--peers", "hf,stock_one_by_one", timestamps, out=tmp_path / "engine.json")
    for peer in ("hf_batched", "hf_direct"):
        assert result["agreement"][peer]["tokens_equal_share"] == 1.0
        assert result["agreement"][peer]["states_relative_l2_max"] < 2e-5


def test_random_weights_decode_to_the_token_budget(tmp_path: Path) -> None:
    arguments = "--weights random --model tiny --windows 2 --max-tokens 5 --peers stock_batched"
    result = run_engine(*arguments.split(), out=tmp_path / "engine.json")
    assert result["settings"]["mean_tokens"] == 5
    assert result["agreement"]["stock_batched"]["tokens_equal_share"] == 1.0


def test_engine_benchmark_refuses_a_peer_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no peer is called 'whisperx'; valid are stock_one_by_one"):
        run_engine("--peers", "whisperx", out=tmp_path / "engine.json")


def test_encoder_benchmark(tmp_path: Path) -> None:
    variants = "fp32,batch_2,engine,bfloat16,two_processes"
    small = f"--weights random-tiny --windows 2 --rounds 1 --threads 2 --variants {variants}"
    result = run("encoder.py", *small.split(), out=tmp_path / "encoder.json")
    assert result["variants"].keys() == set(variants.split(","))
    assert result["variants"]["fp32"]["relative_l2"] == 0
    assert result["variants"]["two_processes"]["relative_l2"] < 1e-5
    assert result["variants"]["engine"]["relative_l2"] < 1e-4
    assert 0 < result["variants"]["bfloat16"]["relative_l2"] < 0.1


def test_pipeline_benchmark(tmp_path: Path) -> None:
    result = run("pipeline.py", "--part", "memory", "--tracks", "40", out=tmp_path / "pipeline.json")
    assert result["memory"]["tracks"] == 40
    assert result["memory"]["by_stage"]["engine"]["peak_mib"] > 100


def test_peers_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("daft")
    small = ("--part", "peers", "--songs", "2", "--rounds", "1", "--max-tokens", "8", "--language", "en")
    result = run("pipeline.py", *small, out=tmp_path / "peers.json")["peers"]
    assert result["songs"] == 2
    for name in ("ours", "ray_data_hf", "daft_hf"):
        assert result["rounds"][0][name]["windows"] == result["windows"] == 4
        assert 0 < result["median"][name]["work_s"] < result["median"][name]["wall_s"]
    assert result["speedup"]["ours_over_daft_hf"]["wall_s"] > 0


def test_peers_decode_as_whisper_does() -> None:
    pytest.importorskip("transformers")
    from benchmarks.peers.hf_checkpoint import hugging_face_model

    model = load_whisper(str(assemble_base(REPOSITORY / ".cache" / "whisper-base"))).model
    song = BytesSource((REPOSITORY / "examples/songs/audio/s2t002.m4a").read_bytes())
    window = whisper.pad_or_trim(decode(song, max_duration_s=30).samples)
    mel = whisper.log_mel_spectrogram(window)
    options = whisper.DecodingOptions(fp16=False, without_timestamps=True, sample_len=40)
    tokens = whisper.decode(model, mel, options).tokens
    ids = hugging_face_model(model).generate(mel[None], task="transcribe", max_new_tokens=40)
    assert len(tokens) == 40
    assert ids[0].tolist() == tokens


@pytest.mark.parametrize("peers_up_to", [0, pytest.param(600, marks=pytest.mark.heavy)])
def test_retrieval_benchmark(tmp_path: Path, peers_up_to: int) -> None:
    small = f"--sizes 600 --rounds 1 --peers-up-to {peers_up_to}"
    result = run("retrieval.py", *small.split(), out=tmp_path / "retrieval.json")
    (found,) = result["sizes"]
    assert found["ratio_to_bare_product"]["ours"] > 0
    assert found["peak_memory_mib"] > 50
    exact = {name for name in found["map"] if name != "torchmetrics"}
    assert {"ours", "full_argsort"} <= exact if peers_up_to else exact == {"ours"}
    for name in exact:
        assert found["map"][name] == pytest.approx(found["map"]["ours"], abs=1e-5)


def test_feed_benchmark(tmp_path: Path) -> None:
    small = ("--songs", "1", "--tracks", "1", "--track-s", "10", "--rounds", "1")
    result = run("feed.py", *small, out=tmp_path / "feed.json")
    formats = {"wav", "flac", "mp3", "ogg", "opus", "m4a"}
    for stage in ("fetch_local", "fetch_s3", "decode", "decode_isolated"):
        assert set(result["stages"][stage]) == formats
    assert all(abs(track["audio_s"] - 10) < 0.1 for track in result["tracks"].values())
    cores = result["cores_per_gpu"]["mp3"]
    assert (
        0 < cores["2000"]["mel_on_device"] < cores["2000"]["mel_80_on_cpu"] < cores["4000"]["mel_80_on_cpu"]
    )


def test_ingest_benchmark(tmp_path: Path) -> None:
    small = "--tracks 8 --num-states 60 --dim 16 --crop 40 --crops 8 --cliques 2 --rounds 2 --s3-tracks 6"
    result = run("ingest.py", *small.split(), out=tmp_path / "ingest.json")
    assert set(result["crops"]["warm"]) == {"pread", "crops", "pread_fresh", "seconds"}
    assert result["whole"]["warm"]["crops_first"]["ratio_to_pread"] > 0
    for part in ("warm", "cold"):
        seconds = result["crops"][part]["seconds"]
        ratio = statistics.median(seconds["pread"]) / statistics.median(seconds["crops"])
        assert result["crops"][part]["crops"]["ratio_to_pread"] == pytest.approx(ratio)
    assert len(result["crops"]["batches"]["seconds"]["batches"]) == 2
    assert set(result["s3"]) == {"no_cache", "filling", "from_cache", "seconds"}


def test_train_step_benchmark(tmp_path: Path) -> None:
    small = "--tracks 16 --num-states 320 --dim 16 --threads 1 --loaders 1 --warm-up 1 --steps 2 --hold-ms 5"
    held = "--held-steps 5 --cliques 4 --crop 300"
    result = run("train_step.py", *small.split(), *held.split(), out=tmp_path / "train_step.json")
    assert len(result["step"]["all_seconds"]) == 2
    assert result["held"]["megabytes_per_step"] == 8 * 300 * 16 * 2 / 1e6
    assert result["held"]["milliseconds_per_step"] >= 5
    assert 0 <= result["held"]["waiting_share"] < 1
