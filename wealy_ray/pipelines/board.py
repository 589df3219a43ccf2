"""The board: where the driver of a training and its ranks leave each other word."""

from __future__ import annotations

import time
from typing import Any

from wealy_ray.errors import WealyError
from wealy_ray.training.keeper import Pulse

ASK_EVERY_S = 1.0


class Board:
    """An actor on the driver's node; it outlives the groups of workers."""

    def __init__(self) -> None:
        self._pulse: Pulse | None = None
        self._fault: WealyError | None = None
        self._is_over = self._stops = False

    def look(self) -> tuple[Pulse | None, bool]:
        """For the driver: how far the training is, and whether its last epoch is done."""
        return self._pulse, self._is_over

    def tell(self, pulse: Pulse) -> None:
        """From the first rank: how far it is."""
        self._pulse = pulse

    def blame(self, fault: WealyError) -> None:
        """From a rank: why no group of workers can go on."""
        self._fault = self._fault or fault

    def fault(self) -> WealyError | None:
        """See `blame`."""
        return self._fault

    def stop(self) -> None:
        """From the driver: save and stop."""
        self._stops = True

    def stops(self) -> bool:
        """See `stop`."""
        return self._stops

    def finish(self) -> None:
        """From the first rank: the model is written."""
        self._is_over = True


def pin_board() -> Any:
    """A board on this node, which lives as long as its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Board)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


class BoardEar:
    """What a rank hears from the board and from Ray (`keeper.Ear`); never waits for the board.

    Args:
        board: The actor.
        is_first: Whether this is the first rank: it alone talks with the board.
        steps_per_look: Steps after which all ranks ask Ray whether a node is about to be taken away; they wait for
            one another there, a few milliseconds.
    """

    def __init__(self, board: Any, *, is_first: bool, steps_per_look: int = 4) -> None:
        self._board, self._is_first, self._steps_per_look = board, is_first, steps_per_look
        self._answer: Any = None
        self._asked_s = self._told_s = -ASK_EVERY_S
        self._stops = False
        self._doomed: set[str] = set()
        self._steps = 0

    def tell(self, pulse: Pulse) -> None:
        """How far it is; once a second, and whenever an epoch ends."""
        if not pulse.step or time.monotonic() - self._told_s >= ASK_EVERY_S:
            self._told_s = time.monotonic()
            self._board.tell.remote(pulse)

    def wants(self) -> tuple[bool, bool]:
        """To save once for each node that is about to be taken away; to save and stop when the driver says so."""
        if self._is_first:
            self._ask()
        return self._is_news_of_preemption(), self._stops

    def _ask(self) -> None:
        import ray

        if self._answer is None:
            if time.monotonic() - self._asked_s >= ASK_EVERY_S:
                self._asked_s, self._answer = time.monotonic(), self._board.stops.remote()
        elif ray.wait([self._answer], timeout=0)[0]:
            self._stops, self._answer = ray.get(self._answer), None

    def _is_news_of_preemption(self) -> bool:
        import ray.train

        self._steps += 1
        # all ranks must ask at the same step
        if self._steps % self._steps_per_look:
            return False
        info = ray.train.get_preemption_info()
        doomed = set() if info is None else set(info.preempted_node_ids)
        is_news = not doomed <= self._doomed
        self._doomed |= doomed
        return is_news
