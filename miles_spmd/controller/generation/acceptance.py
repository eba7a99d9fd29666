"""Which of the groups that were submitted a step trains on: the first ones, in the order of submission, that a filter
accepts.

The result is a pure function of that order and of the groups' content. It does not depend on which group finished
first, on how long its reward took, or on the number of engines, so that a step can be repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from miles_spmd.config import RewardTerm
from miles_spmd.plugins.algorithm import GroupFilter
from miles_spmd.plugins.reward import Score
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.types.sample import Sample

Group = list[Sample]
CHECK_EVERY = 0.25  # seconds between looks at whether to wait on


class Acceptance:
    """The groups of a rollout while they are generated, scored, and accepted or dropped.

    A group is judged by the filter as soon as its rewards arrive, so that more prompts can be submitted early. It is
    accepted or dropped only after every group that was submitted before it.
    """

    def __init__(
        self,
        rewards: RewardPool,
        count: int,
        accepts: GroupFilter | None = None,
        terms: Sequence[RewardTerm] = (),
    ) -> None:
        """``count``: groups to accept; ``accepts`` must be a function of the group alone (None: accept all);
        ``terms``: other reward functions than those of ``[reward]``."""
        self.accepted: list[Group] = []
        self.dropped = 0  # before the last accepted group
        self._rewards, self._count, self._accepts, self._terms = rewards, count, accepts, terms
        self.groups: list[Group] = []  # in the order of submission
        self._unfinished: list[int] = []  # samples of each group that are still generating
        self._scored: SimpleQueue[tuple[int, Future[list[Score]]]] = SimpleQueue()  # filled by threads of the pool
        self._verdicts: dict[int, bool | Exception] = {}  # of judged groups; an error is raised in the group's turn
        self._rejected = 0  # judged groups that will be dropped

    @property
    def enough(self) -> bool:
        return len(self.accepted) == self._count

    @property
    def short(self) -> bool:
        """Whether the groups submitted so far cannot be enough, even if the filter accepts all that are not judged."""
        return len(self.groups) - self._rejected < self._count

    @property
    def has_news(self) -> bool:
        """Whether a reward has arrived since the last :meth:`resolve`."""
        return not self._scored.empty()

    def add(self, wave: Sequence[Group]) -> int:
        """Add groups that are submitted now; returns the number of the first of them."""
        first = len(self.groups)
        self.groups += wave
        self._unfinished += [len(group) for group in wave]
        return first

    def finish_sample(self, number: int) -> None:
        """Note that a sample of group ``number`` is complete; the last one starts the group's scoring, unless all have
        a reward already."""
        self._unfinished[number] -= 1
        if not self._unfinished[number]:
            group = self.groups[number]
            if all(sample.reward is not None for sample in group):
                scores: Future[list[Score]] = Future()
                scores.set_result([Score(sample.reward or 0.0, sample.reward_detail) for sample in group])
            else:
                scores = self._rewards.submit(group, self._terms)
            scores.add_done_callback(lambda scores: self._scored.put((number, scores)))

    def resolve(self, *, wait: bool, unless: Callable[[], bool] = lambda: False) -> None:
        """Judge the groups whose rewards have arrived (``wait``: at least one, or until ``unless`` returns True, which
        is called several times a second), and accept or drop those whose turn it is.

        Raises the error of a reward or filter in the turn of its group: groups behind the last that is accepted must
        not end the run, because whether they are scored at all depends on time.
        """
        while self.has_news or (wait and not unless()):
            with contextlib.suppress(Empty):
                self._judge(*self._scored.get(timeout=CHECK_EVERY))
                wait = False
        while not self.enough and (turn := len(self.accepted) + self.dropped) in self._verdicts:
            verdict = self._verdicts[turn]
            if isinstance(verdict, Exception):
                raise verdict
            if verdict:
                self.accepted.append(self.groups[turn])
            else:
                self.dropped += 1

    def _judge(self, number: int, scores: Future[list[Score]]) -> None:
        group = self.groups[number]
        try:
            for sample, score in zip(group, scores.result(), strict=True):
                sample.reward, sample.reward_detail = score.value, score.detail
            verdict: bool | Exception = self._accepts is None or bool(self._accepts(group))
        except Exception as error:
            verdict = error
        self._verdicts[number] = verdict
        self._rejected += verdict is False
