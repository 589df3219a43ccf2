"""Embeddings of all ranks on every rank, with their gradients.

With losses that divide by the whole batch (see `losses`), the gradients of all ranks are to be *added*. DDP averages
them, so a loss is multiplied by the number of ranks before `backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override


def gather_with_gradient(z_BZ: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows of all ranks, in the order of the ranks.

    Args:
        z_BZ: This rank's rows.
        sizes: Rows of every rank; all ranks know them without asking.

    Returns:
        [sum(sizes), Z]. Its gradient, added over ranks, flows back into each rank's own rows.
    """
    if len(sizes) == 1:
        return z_BZ
    assert sizes[dist.get_rank()] == len(z_BZ), (sizes, dist.get_rank(), len(z_BZ))
    gathered: Tensor = _Gather.apply(z_BZ, tuple(sizes))
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, z_BZ: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        most = max(sizes)
        # one shape for all: what a rank has less is padded, and cut off again
        mine = z_BZ.new_zeros(most, z_BZ.shape[1])
        mine[: len(z_BZ)] = z_BZ
        parts = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(parts, mine)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        rank = dist.get_rank()
        first = sum(ctx.sizes[:rank])
        return total[first : first + ctx.sizes[rank]], None
