"""A training in this process, by one rank: what `wealy train` does, without Ray."""

from __future__ import annotations

import torch

from wealy_ray.training.job import Job
from wealy_ray.training.keeper import Keeper, Pulse
from wealy_ray.training.loop import Loop, Rank
from wealy_ray.training.recipe import TrainRecipe


class _Quiet:
    """An ear for a run that nobody listens to."""

    def tell(self, pulse: Pulse) -> None:
        """See `keeper.Ear`."""

    def wants(self) -> tuple[bool, bool]:
        """See `keeper.Ear`."""
        return False, False


def train_alone(recipe: TrainRecipe, device: torch.device | None = None) -> Job:
    """Trains, or goes on with a training that was stopped; of `recipe.resources` only `passes` and `loaders` count.

    Args:
        recipe: The job.
        device: Where; None: the CPU.

    Returns:
        The job, whose model is there now.

    Raises:
        WealyError: See `wealy_ray.errors`.
    """
    # with gather: none the number of workers is part of what the training is
    resources = recipe.resources.model_copy(update={"workers": 1})
    job = Job.open(recipe.model_copy(update={"resources": resources}))
    if job.is_done:
        return job
    job.begin()
    loop = Loop(job.recipe, job.splits, Rank(0, 1, device or torch.device("cpu")), Keeper(job, _Quiet()))
    found = job.checkpoints.read_latest()
    if found is not None:
        loop.load(*found)
    loop.run()
    job.finish(loop)
    return job
