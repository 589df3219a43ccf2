"""The training loop of one rank.

Everything random is a function of (seed, epoch, step, pass or row), so a checkpoint needs no generator's state, and the
loop can stop after any step. With equal ranks a run that went on ends bit-equal to one that was never stopped.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from wealy_ray.errors import TrainingError
from wealy_ray.model import StateNetwork, build_loss, build_model, gather_with_gradient
from wealy_ray.training.checkpoint import Progression
from wealy_ray.training.crops import CropReader
from wealy_ray.training.data import Batches, Step, Tracks, input_statistics, name_some
from wealy_ray.training.feed import Feed
from wealy_ray.training.measure import Embedder, nearest_cliques, validation_map
from wealy_ray.training.optimiser import add_gradients, build_optimiser, clip_gradients, learning_rate
from wealy_ray.training.recipe import TrainRecipe
from wealy_ray.training.sampler import CliqueSampler

log = logging.getLogger(__name__)

DROPOUT = 4
"""Stream of random numbers of dropout, beside those of sampler and crops."""


@dataclass(frozen=True)
class Rank:
    """This process among its like.

    Attributes:
        number: From 0 on.
        world_size: How many there are.
        device: Where the network is.
    """

    number: int
    world_size: int
    device: torch.device


@dataclass(frozen=True, eq=False)
class Splits:
    """What is trained on and measured on.

    Attributes:
        train: Tracks of the training split.
        validation: Tracks of the validation split.
        crops: Reads both.
    """

    train: Tracks
    validation: Tracks
    crops: CropReader


class Watcher(Protocol):
    """Whoever runs a loop: is told what happens, and says what is wanted."""

    def wants(self, loop: Loop) -> tuple[bool, bool]:
        """After each step: whether to save, and whether to stop; one rank's wish is granted by all."""
        ...

    def save(self, loop: Loop, *, is_wanted: bool) -> None:
        """Called by all ranks together: when anyone wanted it or wants to stop, and with every epoch that ends."""
        ...


class Loop:
    """One rank's training.

    Args:
        recipe: The job.
        splits: The tracks.
        rank: This process.
        watcher: See `Watcher`.
    """

    def __init__(self, recipe: TrainRecipe, splits: Splits, rank: Rank, watcher: Watcher) -> None:
        self.recipe, self.splits, self.rank, self.watcher = recipe, splits, rank, watcher
        data = recipe.data
        self.sampler = CliqueSampler(
            splits.train.cliques,
            cliques_per_batch=data.cliques_per_batch,
            versions_per_clique=data.versions_per_clique,
            seed=recipe.seed,
            epoch_by=data.epoch_by,
        )
        torch.manual_seed(recipe.seed)
        self.input_dim = splits.crops.dim
        self.network: StateNetwork = build_model(recipe.model, self.input_dim).to(rank.device)
        self.optimiser = build_optimiser(self.network, recipe.optimiser)
        self.loss = build_loss(recipe.loss)
        self.progression = Progression()
        self.is_fresh = True
        self.waited_s = 0.0
        self.tracks_done = 0
        self.last_loss = math.nan
        self._feed: Feed | None = None

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.network.parameters())

    def load(self, weights: dict[str, Tensor], optimiser: dict[str, Any], progression: Progression) -> None:
        """Goes on from a checkpoint."""
        self.network.load_state_dict(weights)
        self.optimiser.load_state_dict(optimiser)
        self.progression, self.is_fresh = progression, False
        if progression.neighbours is not None:
            self.sampler.set_neighbours(progression.neighbours.numpy())

    def run(self) -> bool:
        """Trains until the last epoch or until nothing gets better (True), or until somebody wants to stop (False).

        Raises:
            TrainingError: States, a loss or gradients are NaN or infinite.
        """
        recipe = self.recipe
        if self.is_fresh and recipe.model.standardise:
            self.network.set_input_statistics(
                *input_statistics(self.splits.train, self.splits.crops, recipe.seed)
            )
        try:
            while not self.is_over:
                if not self._epoch():
                    return False
        finally:
            self._end_feed()
        return True

    @property
    def is_over(self) -> bool:
        """Whether the last epoch is done, or validation MAP has not grown for as long as the recipe is patient."""
        progression, recipe = self.progression, self.recipe
        return (
            progression.epoch >= recipe.optimiser.epochs
            or progression.measured_without_gain >= recipe.validation.patience
        )

    @property
    def is_best(self) -> bool:
        """Whether no measurement was better than the one that was just made."""
        progression = self.progression
        return not progression.step and progression.best_epoch == progression.epoch

    def _epoch(self) -> bool:
        """One epoch, or what is left of it; False: somebody wants to stop."""
        progression, recipe = self.progression, self.recipe
        self._mine()
        steps = self.sampler.steps(progression.epoch)
        saves = stops = False
        while progression.step < steps:
            step = self._next_step()
            loss, norm, saves, stops = self._step(step, steps)
            self.last_loss = loss
            sums = progression.sums
            for name, value in (
                ("loss", loss),
                ("steps", 1.0),
                ("norm", norm),
                ("padded", step.padded_share),
            ):
                sums[name] = sums.get(name, 0.0) + value
            progression.step = step.step + 1
            if progression.step < steps:
                if saves or stops:
                    self.watcher.save(self, is_wanted=True)
                if stops:
                    return False
        sums = progression.sums
        entry = {
            "epoch": float(progression.epoch + 1),
            "loss": sums["loss"] / sums["steps"],
            "gradient_norm": sums["norm"] / sums["steps"],
            "padded_share": sums["padded"] / sums["steps"],
            "learning_rate": learning_rate(recipe.optimiser, progression.epoch),
        }
        progression.epoch, progression.step, progression.sums = progression.epoch + 1, 0, {}
        last = progression.epoch == recipe.optimiser.epochs
        if last or progression.epoch % recipe.validation.every_epochs == 0:
            entry["map"] = self._measure()
        progression.history.append(entry)
        self.watcher.save(self, is_wanted=saves or stops)
        return not stops

    def _next_step(self) -> Step:
        resources, rank, progression = self.recipe.resources, self.rank, self.progression
        if self._feed is None:
            batches = Batches(
                self.splits.train,
                self.sampler,
                self.splits.crops,
                rank.number,
                rank.world_size,
                resources.passes,
                gathers=self.recipe.gather == "all",
            )
            place, pins = (progression.epoch, progression.step), rank.device.type == "cuda"
            epochs = self.recipe.optimiser.epochs
            self._feed = Feed(batches, place, epochs, resources.loaders, pins=pins)
        began_s = time.monotonic()
        # the last step's loss was read: nothing is copied from its states any more
        step = next(self._feed)
        self.waited_s += time.monotonic() - began_s
        assert (step.epoch, step.step) == (progression.epoch, progression.step), "steps come in their order"
        return step

    def _step(self, step: Step, steps: int) -> tuple[float, float, bool, bool]:
        """Forward, backward, update.

        Returns:
            The loss of the whole batch, the norm of its gradients, and whether any rank wants to save, and to stop.
        """
        recipe, rank, progression = self.recipe, self.rank, self.progression
        rate = learning_rate(recipe.optimiser, progression.epoch + step.step / steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.network.train()
        z = self._compared(step)
        loss = self._loss(step, z)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        parameters = list(self.network.parameters())
        add_gradients(parameters, rank.world_size)
        norm = clip_gradients(parameters, recipe.optimiser.clip)
        wishes = [float(wish) for wish in self.watcher.wants(self)]
        told = torch.cat([loss.detach().reshape(1), torch.tensor(wishes, device=rank.device)])
        if rank.world_size > 1:
            dist.all_reduce(told)
        value, saves, stops = told.tolist()
        if not math.isfinite(value + float(norm)):
            raise self._fault(step, z.detach(), value)
        self.optimiser.step()
        self.tracks_done += len(step.tracks)
        return value, float(norm), saves > 0, stops > 0

    def _compared(self, step: Step) -> Tensor:
        """Embeddings that are compared, in the order of `step.tracks`, whatever rank embedded what."""
        # a rank without a pass takes part all the same: the others wait for it
        none = torch.zeros(0, self.recipe.model.output_dim, device=self.rank.device, requires_grad=True)
        z = torch.cat([none, *(self._forward(step, i) for i in range(len(step.passes)))])
        if self.recipe.gather == "all":
            z = gather_with_gradient(z, step.sizes)
        return z[step.order.to(self.rank.device).argsort()]

    def _loss(self, step: Step, z: Tensor) -> Tensor:
        """This rank's part of the loss; the parts of all ranks add up to that of the batch."""
        rank = self.rank
        cliques = step.cliques.to(rank.device)
        if self.recipe.gather == "none":
            return self.loss(z, cliques, None) / rank.world_size
        first = sum(step.sizes[: rank.number])
        mine = step.order[first : first + step.sizes[rank.number]].to(rank.device)
        return self.loss(z, cliques, mine)

    def _fault(self, step: Step, z: Tensor, loss: float) -> TrainingError:
        """What all ranks say, all the same, of a batch that cannot be learnt from."""
        found = [[name for name, row in zip(step.tracks, z, strict=True) if not row.isfinite().all()]]
        if self.rank.world_size > 1:
            mine, found = found[0], [[] for _ in range(self.rank.world_size)]
            dist.all_gather_object(found, mine)
        tracks = sorted({name for names in found for name in names}) or step.tracks
        what = f"the loss is {loss:g}" if not math.isfinite(loss) else "gradients are not finite"
        log.warning("%s; tracks: %s", what, ", ".join(tracks))
        return TrainingError(
            f"{what} in epoch {self.progression.epoch + 1}, step {step.step + 1}, with tracks {name_some(tracks)} "
            "(all are in the log); look at their states, or lower optimiser.learning_rate"
        )

    def _forward(self, step: Step, i: int) -> Tensor:
        """Embeddings of the rank's i-th pass; its dropout depends on the pass, not on the rank."""
        rank, precision = self.rank, self.recipe.optimiser.precision
        seed = hash_of(self.recipe.seed, DROPOUT, self.progression.epoch, step.step, step.passes[i])
        torch.manual_seed(seed)
        states = step.states[i].to(rank.device, non_blocking=True).float()
        lengths = step.lengths[i].to(rank.device, non_blocking=True)
        half = precision == "bfloat16" or (
            precision == "auto" and rank.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        with torch.autocast(rank.device.type, torch.bfloat16) if half else nullcontext():
            z: Tensor = self.network(states, lengths)
        return z.float()

    def _embedder(self) -> Embedder:
        rank = self.rank
        return Embedder(self.network, self.splits.crops, rank.number, rank.world_size, rank.device)

    def _measure(self) -> float:
        """Validation MAP, and whether it is the best so far."""
        progression, validation = self.progression, self.splits.validation
        windows = self.recipe.data.validate_on == "windows"
        found = validation_map(validation, *self._embedder().embed(validation, windows=windows))
        if found > progression.best_map:
            progression.best_map, progression.best_epoch = found, progression.epoch
            progression.measured_without_gain = 0
        else:
            progression.measured_without_gain += 1
        return found

    def _mine(self) -> None:
        mining, progression = self.recipe.mining, self.progression
        if (
            mining is None
            or progression.step
            or not progression.epoch
            or progression.epoch % mining.every_epochs
        ):
            return
        z, _ = self._embedder().embed(self.splits.train, windows=False)
        near = nearest_cliques(list(self.sampler.members), z, mining.neighbours)
        progression.neighbours = torch.from_numpy(near)
        self.sampler.set_neighbours(near)
        self._end_feed()  # what was read ahead is of the old neighbours

    def _end_feed(self) -> None:
        if self._feed is not None:
            self._feed.close()
            self._feed = None

    def state(self) -> tuple[dict[str, Any], Progression]:
        """What a checkpoint holds beside the network."""
        return self.optimiser.state_dict(), copy.copy(self.progression)


def hash_of(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
