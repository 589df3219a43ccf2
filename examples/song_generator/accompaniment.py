"""A small band: chords of four bars, a bass and drums in five styles; and a room for live recordings."""

from __future__ import annotations

import functools
import random

import numpy as np

from examples.song_generator.song import Music
from examples.song_generator.voices import SAMPLE_RATE_HZ

SCALES = {"major": [0, 2, 4, 5, 7, 9, 11], "minor": [0, 2, 3, 5, 7, 8, 10]}
LOWEST_ROOT = 48
"""MIDI number of the key C."""
ARPEGGIO = (0, 1, 2, 1)
DRUM_S = 0.18


def accompany(
    num_samples: int, music: Music, style: str, *, transpose: int, bpm: float, rng: random.Random
) -> np.ndarray:
    """The accompaniment of a song, float32 [num_samples], peak .8."""
    noise = np.random.default_rng(rng.randrange(2**31))
    out = np.zeros(num_samples + 4 * SAMPLE_RATE_HZ)
    beat_s = 60 / bpm
    timbre = "pluck" if style == "band" else style

    @functools.cache  # a note sounds the same each time it is played
    def note(midi: int, length: int) -> np.ndarray:
        return _tone(440.0 * 2 ** ((midi - 69) / 12), length, timbre, rng)

    def play(at_s: float, y: np.ndarray, gain: float) -> None:
        start = int(at_s * SAMPLE_RATE_HZ)
        y = y[: max(0, len(out) - start)]
        out[start : start + len(y)] += gain * y

    def samples(duration_s: float) -> int:
        return int(duration_s * SAMPLE_RATE_HZ)

    bar, at_s = 0, 0.0
    while at_s * SAMPLE_RATE_HZ < num_samples:
        chord = _chord(music, bar, transpose)
        if style in ("pluck", "band", "chip"):
            for eighth in range(8):
                midi = chord[ARPEGGIO[eighth % 4]] + 12
                play(at_s + eighth * beat_s / 2, note(midi, samples(beat_s * 0.9)), 0.35)
        else:
            for midi in chord:
                play(at_s, note(midi + 12, samples(beat_s * 4)), 0.3)
        for beat in (0, 2):
            play(at_s + beat * beat_s, note(chord[0] - 12, samples(beat_s * 1.8)), 0.6)
        if style != "pad":
            for beat in range(4):
                drum = _kick() if beat % 2 == 0 else _snare(noise)
                play(at_s + beat * beat_s, drum, 0.7)
                for half in (0, 0.5):
                    play(at_s + (beat + half) * beat_s, _hihat(noise), 0.5)
        at_s += 4 * beat_s
        bar += 1
    y = out[:num_samples]
    return (y / (np.abs(y).max() + 1e-9) * 0.8).astype(np.float32)


def reverberate(x: np.ndarray, rng: random.Random, duration_s: float, wet: float) -> np.ndarray:
    """Adds a room of decaying noise; float32 [num_samples]."""
    length = int(duration_s * SAMPLE_RATE_HZ)
    noise = np.random.default_rng(rng.randrange(2**31))
    room = noise.standard_normal(length) * np.exp(-6 * np.arange(length) / length)
    room /= np.sqrt((room**2).sum())
    size = 1 << (len(x) + length).bit_length()
    y = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(room, size), size)[: len(x)]
    return ((1 - wet) * x + wet * y).astype(np.float32)


def _chord(music: Music, bar: int, transpose: int) -> list[int]:
    """MIDI numbers of the triad of a bar."""
    scale = SCALES[music.mode]
    degree = music.progression[bar % len(music.progression)]
    root = LOWEST_ROOT + music.key + transpose
    return [root + scale[(degree + step) % 7] + 12 * ((degree + step) // 7) for step in (0, 2, 4)]


def _tone(hz: float, length: int, timbre: str, rng: random.Random) -> np.ndarray:
    t = np.arange(length) / SAMPLE_RATE_HZ
    left_s = length / SAMPLE_RATE_HZ - t
    if timbre == "pad":  # each partial twice, out of tune with itself
        detuned = [(partial, by) for partial in (1, 2, 3) for by in (-0.002, 0.002)]
        y = sum(np.sin(2 * np.pi * hz * k * (1 + d) * t) / k for k, d in detuned)
        envelope = np.minimum(1, t / 0.15) * np.minimum(1, left_s / 0.15)
    elif timbre == "organ":
        drawbars = ((0.5, 0.5), (1, 1), (2, 0.6), (3, 0.3), (4, 0.2))
        y = sum(gain * np.sin(2 * np.pi * hz * k * t) for k, gain in drawbars)
        envelope = np.minimum(1, t / 0.01) * np.minimum(1, left_s / 0.02)
    elif timbre == "chip":
        y = np.sign(np.sin(2 * np.pi * hz * t)) * 0.6
        envelope = np.exp(-3 * t)
    else:
        y = _plucked_string(hz, length, rng)
        envelope = np.minimum(1, left_s / 0.02)
    return y * np.clip(envelope, 0, 1)


def _plucked_string(hz: float, length: int, rng: random.Random) -> np.ndarray:
    """Karplus and Strong: a burst of noise that runs round and is smoothed each time."""
    period = max(2, int(SAMPLE_RATE_HZ / hz))
    string = np.array([rng.uniform(-1, 1) for _ in range(period)])
    y = np.empty(length)
    for start in range(0, length, period):
        y[start : start + period] = string[: length - start]
        string = 0.498 * (string + np.roll(string, -1))
    return y


def _drum_times() -> np.ndarray:
    return np.arange(int(DRUM_S * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ


def _kick() -> np.ndarray:
    t = _drum_times()
    return np.sin(2 * np.pi * (50 * t + 12 * (1 - np.exp(-30 * t)))) * np.exp(-18 * t) * 1.2


def _snare(noise: np.random.Generator) -> np.ndarray:
    t = _drum_times()
    rattle = noise.standard_normal(len(t)) * np.exp(-22 * t)
    return (rattle + np.sin(2 * np.pi * 190 * t) * np.exp(-30 * t)) * 0.5


def _hihat(noise: np.random.Generator) -> np.ndarray:
    t = _drum_times()
    return np.diff(noise.standard_normal(len(t)), prepend=0) * np.exp(-70 * t) * 0.25
