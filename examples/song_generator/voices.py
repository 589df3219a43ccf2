"""Voices that speak a line: two neural ones from PyPI packages, and espeak-ng and flite.

Piper (Joe, English) and Kokoro (a Japanese speaker who is given the phonemes of Spanish, Italian and German)
run on ONNX Runtime; espeak-ng turns text into phonemes for both.
"""

from __future__ import annotations

import functools
import io
import json
import re
import subprocess
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np

from examples.song_generator.installed import (
    JOE,
    JOE_SETTINGS,
    KOKORO,
    KOKORO_SPEAKERS,
    KOKORO_SYMBOLS,
    VoiceFile,
)
from wealy_ray.errors import ConfigError

SAMPLE_RATE_HZ = 22050
KOKORO_RATE_HZ = 24000
KOKORO_MAX_TOKENS = 500
KOKORO_AFFRICATES = {"d\u0292": "\u02a4", "t\u0283": "\u02a7", "ts": "\u02a6", "dz": "\u02a3"}
"""Two of espeak-ng's sounds that are one for Kokoro."""
ESPEAK_LANGUAGES = {"en": "en-us", "es": "es", "it": "it", "de": "de"}
ESPEAK_WORDS_PER_MINUTE = 145


def speak(engine: str, voice: str, language: str, words: str) -> np.ndarray:
    """One spoken line, float32 [num_samples] at `SAMPLE_RATE_HZ`, loud and without silence around it."""
    y = ENGINES[engine](words, language, voice)
    y = y / (np.abs(y).max() + 1e-6) * 0.9
    loud = np.flatnonzero(np.abs(y) > 0.01)
    if len(loud):
        y = y[max(0, loud[0] - 300) : loud[-1] + 600]
    return y.astype(np.float32)


def run_program(command: list[str], stdin: bytes = b"") -> bytes:
    """What a program writes to its standard output.

    Raises:
        ConfigError: It failed; with the last line of its complaint.
    """
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if done.returncode != 0:
        complaint = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ConfigError(f"{command[0]} failed with code {done.returncode}: {complaint[-1]}")
    return done.stdout


def _espeak(words: str, language: str, voice: str) -> np.ndarray:
    variant = ESPEAK_LANGUAGES[language] + (f"+{voice}" if voice else "")
    return _spoken_by(["espeak-ng", "-v", variant, "-s", str(ESPEAK_WORDS_PER_MINUTE), "-w", "@", words])


def _flite(words: str, language: str, voice: str) -> np.ndarray:
    assert language == "en"
    return _spoken_by(["flite", "-voice", voice, "--setf", "duration_stretch=1.000", "-t", words, "-o", "@"])


def _piper(words: str, language: str, voice: str) -> np.ndarray:
    assert (language, voice) == ("en", "joe")
    settings = _joe_settings()
    ids = settings["phoneme_id_map"]
    tokens = [*ids["^"], *ids["_"]]
    for symbol in _phonemes(words, language) + ".":
        if symbol in ids:
            tokens += [*ids[symbol], *ids["_"]]
    tokens += ids["$"]
    inputs = {
        "input": np.array([tokens], np.int64),
        "input_lengths": np.array([len(tokens)], np.int64),
        "scales": np.array([0.0, 1.0, 0.0], np.float32),  # no noise: the same words sound the same
    }
    (y,) = _session(JOE).run(None, inputs)
    return _resample(y.ravel(), settings["audio"]["sample_rate"])


def _kokoro(words: str, language: str, voice: str) -> np.ndarray:
    speakers, ids = _kokoro_data()
    symbols = _phonemes(words, language)
    for ipa, symbol in KOKORO_AFFRICATES.items():
        symbols = symbols.replace(ipa, symbol)
    tokens = [ids[symbol] for symbol in symbols + "." if symbol in ids][:KOKORO_MAX_TOKENS]
    styles = speakers[voice]  # one style per length of the line
    inputs = {
        "tokens": np.array([[0, *tokens, 0]], np.int64),
        "style": styles[min(len(tokens), len(styles)) - 1].reshape(1, 256).astype(np.float32),
        "speed": np.array([1.0], np.float32),
    }
    (y, *_) = _session(KOKORO).run(None, inputs)
    return _resample(y.ravel(), KOKORO_RATE_HZ)


ENGINES = {"espeak": _espeak, "flite": _flite, "piper": _piper, "kokoro": _kokoro}


def _phonemes(words: str, language: str) -> str:
    """Words in IPA; marks of a switch of language, such as (en), are left out."""
    ipa = run_program(["espeak-ng", "-q", "--ipa", "-v", ESPEAK_LANGUAGES[language], words]).decode()
    return re.sub(r"\([a-z-]+\)", "", " ".join(ipa.split()))


def _spoken_by(command: list[str]) -> np.ndarray:
    """What a program speaks into the wave file that stands as `@` in its command."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "line.wav")
        run_program([path if word == "@" else word for word in command])
        with wave.open(path) as file:
            pcm, rate_hz = file.readframes(file.getnframes()), file.getframerate()
    return _resample(np.frombuffer(pcm, "<i2").astype(np.float32) / 32768, rate_hz)


def _resample(x: np.ndarray, rate_hz: int) -> np.ndarray:
    if rate_hz == SAMPLE_RATE_HZ:
        return x.astype(np.float32)
    import soxr

    return soxr.resample(x.astype(np.float32), rate_hz, SAMPLE_RATE_HZ)


@functools.cache
def _session(file: VoiceFile) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # songs are made by many processes
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file.read(), sess_options=options, providers=["CPUExecutionProvider"])


@functools.cache
def _joe_settings() -> dict[str, Any]:
    return json.loads(JOE_SETTINGS.read())


@functools.cache
def _kokoro_data() -> tuple[dict[str, np.ndarray], dict[str, int]]:
    speakers = dict(np.load(io.BytesIO(KOKORO_SPEAKERS.read())))
    return speakers, json.loads(KOKORO_SYMBOLS.read())["vocab"]
