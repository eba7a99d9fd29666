"""Prompts from step to step: which ones a step begins, and what the steps before it have left behind."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from miles_spmd.config import Config
from miles_spmd.controller.datasets import Datasets, position_of
from miles_spmd.types.sample import Prompt


class Waiting(msgspec.Struct, frozen=True):
    """A group that no step has trained on yet: the prompt at ``position`` of the data, begun in ``step``."""

    position: int
    step: int


class Backlog(msgspec.Struct, frozen=True):
    """Where the data goes on, and the groups that wait, in the order in which they were begun."""

    position: int = 0
    waiting: list[Waiting] = []


class Supply:
    """Gives each step its first prompts.

    Without ``partial_rollout`` and ``balanced`` they are a function of the step, and nothing is left behind.
    """

    def __init__(self, config: Config, data: Datasets) -> None:
        rollout = config.rollout
        self._data, self._accepts = data, rollout.rollout_batch_size
        self._submits = rollout.submitted_groups
        self.continues, self._collects = rollout.partial_rollout, rollout.acceptance == "balanced"
        self.backlog = Backlog()

    @property
    def keeps(self) -> bool:
        """Whether groups wait from step to step."""
        return self.continues or self._collects

    @property
    def room(self) -> int:
        """Number of groups that a step may leave behind to be continued."""
        return self._submits - self._accepts if self.continues else 0

    @property
    def is_long(self) -> bool:
        """Whether enough groups wait that did not finish in time: they are a batch of their own."""
        return self._collects and len(self.backlog.waiting) >= self._accepts

    def continued(self) -> list[tuple[Prompt, int]]:
        """Return the prompts of groups that go on, and the steps in which they were begun."""
        if not self.continues:
            return []
        return [(self._data.at(one.position), one.step) for one in self.backlog.waiting]

    def first(self, step: int) -> list[Prompt]:
        """Return the prompts that ``step`` begins before it knows that it needs more."""
        if not self.keeps:
            return self._data.prompts(step, self._submits)
        return [self._data.at(position) for position in self._positions]

    @property
    def _positions(self) -> list[int]:
        if self.is_long:
            return [one.position for one in self.backlog.waiting[: self._accepts]]
        count = self._submits - (len(self.backlog.waiting) if self.continues else 0)
        return list(range(self.backlog.position, self.backlog.position + count))

    def end(self, left: Sequence[tuple[Prompt, int]]) -> None:
        """Take what a step has left behind: prompts, and the steps in which they were begun."""
        if not self.keeps:
            return
        now = [Waiting(position, step) for prompt, step in left if (position := position_of(prompt.uid)) >= 0]
        position, before = self.backlog.position, [] if self.continues else self.backlog.waiting
        if self.is_long:
            before = before[self._accepts :]
        else:
            position += len(self._positions)
        self.backlog = Backlog(position, [*before, *now])
