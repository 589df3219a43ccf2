"""AdamW, its learning rate, and gradients that all ranks agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wealy_ray.training.recipe import OptimiserSettings


def build_optimiser(network: nn.Module, settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW over all parameters, as the paper; no parameter is exempt from weight decay."""
    return torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def learning_rate(settings: OptimiserSettings, epoch: float) -> float:
    """Linear from `warmup_from` of it over the warm-up, then half a cosine down to zero at the last epoch.

    Args:
        settings: The recipe's.
        epoch: Epochs that are done; a fraction within one.
    """
    warmup, epochs = settings.warmup_epochs, settings.epochs
    if epoch < warmup:
        share = settings.warmup_from + (1 - settings.warmup_from) * epoch / warmup
    else:
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / max(1, epochs - warmup))))
    return settings.learning_rate * share


def add_gradients(parameters: Sequence[nn.Parameter], world_size: int) -> None:
    """Adds the gradients of all ranks, in one flat buffer.

    DDP would hide the wait behind the backward pass; but it lays its buffers out anew after the first step, so that a
    run that goes on from a checkpoint would add in another order, and round differently. The networks are small: 40 MB.
    """
    if world_size == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scales gradients down to a norm of `most`; gives the norm that they had."""
    return nn.utils.clip_grad_norm_(parameters, most, foreach=False)
