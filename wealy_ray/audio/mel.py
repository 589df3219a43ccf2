"""Windows of samples -> Whisper's log-mel input.

openai-whisper subtracts nothing but clamps everything below the maximum of *what it is given* minus 8 (in
log10). Given a chunk, a batch or a file, the features of one and the same window differ by up to 0.43. Here
the maximum is the **track's**, over all its windows: the same for every batch, device and number of workers,
and for a track of one window exactly what `whisper.audio.log_mel_spectrogram` returns.

Shapes: W windows, M mel bands, T = 3000 frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from whisper.audio import HOP_LENGTH, N_FFT, N_FRAMES, N_SAMPLES, mel_filters

from wealy_ray.audio.windows import WINDOW_SAMPLES, Window

assert N_SAMPLES == WINDOW_SAMPLES


def log_mel_windows(
    samples: np.ndarray, windows: Sequence[Window], *, n_mels: int, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Compute the log-mel features of all windows of one track.

    Each window is padded with zeros to 30 s and transformed alone, so that its numbers (but for the common
    maximum) do not depend on the others. 6 to 8 ms per window and core.

    Args:
        samples: float32 `[n]`, 16 kHz mono.
        windows: All windows of the track (`plan_windows`), at least one.
        n_mels: 80, or 128 for large-v3 and turbo.
        device: Where to compute; the result stays there.

    Returns:
        float32 `[W, n_mels, 3000]`.
    """
    assert len(windows) > 0
    filters_MF = mel_filters(device, n_mels)
    hann = torch.hann_window(N_FFT).to(device)
    mel_WMT = torch.empty(len(windows), n_mels, N_FRAMES, device=device)
    padded = np.zeros(N_SAMPLES, np.float32)
    for i, window in enumerate(windows):
        length = window.end - window.start
        padded[:length] = samples[window.start : window.end]
        padded[length:] = 0.0
        audio = torch.from_numpy(padded).to(device)
        stft_FT = torch.stft(audio, N_FFT, HOP_LENGTH, window=hann, return_complex=True)
        power_FT = stft_FT[..., :-1].abs() ** 2
        mel_WMT[i] = torch.clamp(filters_MF @ power_FT, min=1e-10).log10()
    floor = mel_WMT.max() - 8.0
    return (torch.maximum(mel_WMT, floor) + 4.0) / 4.0
