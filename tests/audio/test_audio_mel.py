import numpy as np
import pytest
import torch
from whisper.audio import log_mel_spectrogram, pad_or_trim

from wealy_ray.audio import plan_windows
from wealy_ray.audio.mel import log_mel_windows


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def track(duration_s: float, seed: int = 0) -> np.ndarray:
    """Noise and a chord that grows louder, so that the windows have different maxima."""
    t = np.arange(int(duration_s * 16_000)) / 16_000
    noise = 0.01 * np.random.default_rng(seed).standard_normal(len(t))
    return ((np.sin(880 * np.pi * t) + np.sin(1320 * np.pi * t)) * t / (4 * t[-1]) + noise).astype(np.float32)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("duration_s", [0.01, 3.7, 29.99, 30.0])
def test_one_window_is_bit_equal_to_whisper(duration_s, n_mels):
    samples = track(duration_s)
    mel = log_mel_windows(samples, plan_windows(len(samples)), n_mels=n_mels)
    expected = log_mel_spectrogram(pad_or_trim(samples), n_mels)
    assert mel.dtype == torch.float32
    assert mel.shape == (1, n_mels, 3000)
    assert torch.equal(mel[0], expected)


def test_silence():
    mel = log_mel_windows(np.zeros(16_000, np.float32), plan_windows(16_000), n_mels=80)
    assert torch.equal(mel, torch.full_like(mel, -1.5))  # (log10(1e-10) + 4) / 4


def test_the_maximum_is_the_track_s():
    samples = track(95.0)
    windows = plan_windows(len(samples))
    mel = log_mel_windows(samples, windows, n_mels=80)
    # Whisper, window by window, with its own clamp undone: each is given the track's maximum instead.
    alone = [log_mel_spectrogram(pad_or_trim(samples[w.start : w.end]), 80) for w in windows]
    peak = max(float(x.max()) for x in alone)
    assert min(float(x.max()) for x in alone) < peak - 0.05
    floor = peak - 2.0  # 8 / 4
    assert float(mel.max()) == peak
    assert float(mel.min()) >= floor
    for ours, theirs in zip(mel, alone, strict=True):
        torch.testing.assert_close(ours, theirs.clamp(min=floor), rtol=0, atol=1e-6)


def test_windows_do_not_depend_on_what_is_computed_with_them():
    samples = track(95.0)
    windows = plan_windows(len(samples))
    loudest = windows[-1:]
    both = log_mel_windows(samples, windows[:1] + loudest, n_mels=80)
    every = log_mel_windows(samples, windows, n_mels=80)
    assert torch.equal(every[[0, -1]], both)
    assert torch.equal(every, log_mel_windows(samples, windows, n_mels=80))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees_with_the_cpu():
    samples = track(95.0)
    windows = plan_windows(len(samples))
    gpu = log_mel_windows(samples, windows, n_mels=128, device="cuda").cpu()
    torch.testing.assert_close(gpu, log_mel_windows(samples, windows, n_mels=128), rtol=0, atol=1e-3)
