"""Linear maps, packed for oneDNN where the CPU's own matrix library is slower.

torch multiplies float32 matrices on the CPU with MKL, which on AMD processors does not use AVX-512: measured on
an EPYC, oneDNN with packed weights is 2.3 times as fast for the encoder (1500 rows) and 2 to 4 times for a
decoder step (16 rows), in the same float32. Weights are packed once for the number of rows they will meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override


@dataclass(frozen=True)
class Affine:
    """A linear map; weight [out, in] as `torch.nn.functional.linear` takes it."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return nn.functional.linear(x, self.weight, self.bias)

    def columns(self, x: Tensor) -> Tensor:
        """Map [n, in] to [out, n]: the transposed result at once."""
        product = self._weight_times(x)
        return product if self.bias is None else product.add_(self.bias[:, None])

    def _weight_times(self, x: Tensor) -> Tensor:
        return torch.mm(self.weight, x.T)


@dataclass(frozen=True)
class PackedAffine(Affine):
    """The same through oneDNN; `packed` is the weight in its layout."""

    packed: Tensor

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    @override
    def _weight_times(self, x: Tensor) -> Tensor:
        # The roles are swapped: the rows of `x` are the map, those of the weight what is mapped.
        return multiply_transposed(self.weight, x)


def multiply_transposed(x: Tensor, y: Tensor) -> Tensor:
    """[n, k] times the transposed [m, k], through oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def affine(weight: Tensor, bias: Tensor | None, *, rows: int | None, transposes: bool = False) -> Affine:
    """A linear map.

    Args:
        weight: [out, in].
        bias: [out], or None.
        rows: It is packed for inputs of about so many rows; None, or no oneDNN: not packed.
        transposes: Whether `columns` will be called: only then is a packed map's weight kept as well.
    """
    if rows is None or weight.device.type != "cpu" or not can_pack(weight.dtype):
        return Affine(weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return PackedAffine(weight if transposes else weight.new_empty(0), bias, packed)


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear`."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self.affine = affine(linear.weight.detach(), bias, rows=rows)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN, for maps of this dtype."""
    is_there = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()
    return is_there and dtype in (torch.float32, torch.bfloat16)
