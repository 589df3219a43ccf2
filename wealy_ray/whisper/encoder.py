"""Whisper's encoder at one fixed batch shape.

Legend: B batch rows, M mel bins, N mel frames (3000), T audio positions (1500), D state width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from whisper.model import Whisper


class BatchEncoder:
    """Encodes windows in batches that are always padded to the same number of rows.

    Args:
        model: The Whisper model; not modified.
        batch: B.
        device: Where to compute.
        dtype: What to compute in; LayerNorms stay float32, like whisper's.
    """

    def __init__(self, model: Whisper, batch: int, *, device: torch.device, dtype: torch.dtype):
        self.batch = batch
        self.device = device
        self.dtype = dtype
        self.mel_shape = (model.dims.n_mels, 2 * model.dims.n_audio_ctx)
        self.encoder = _cast(model.encoder, device, dtype)

    def encode(self, mels: list[Tensor]) -> list[Tensor]:
        """Encode up to B windows.

        Args:
            mels: Log-mel windows, each [M, N].

        Returns:
            Features [T, D] per window, in order.
        """
        assert 0 < len(mels) <= self.batch, len(mels)
        x_BMN = torch.zeros((self.batch, *self.mel_shape), device=self.device, dtype=self.dtype)
        for row, mel_MN in enumerate(mels):
            x_BMN[row] = mel_MN.to(self.device)
        features_BTD = self.encoder(x_BMN)
        return list(features_BTD[: len(mels)].unbind(0))


def _cast(encoder: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy with linear and convolution weights in `dtype`; the module itself where nothing changes."""
    parameter = next(encoder.parameters())
    if parameter.dtype == dtype and parameter.device == device:
        return encoder
    encoder = copy.deepcopy(encoder).to(device)
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.to(dtype)
    return encoder
