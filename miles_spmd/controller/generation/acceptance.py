"""Which of the groups that were submitted a step trains on: the first ones, in the order of submission, that a filter
accepts.

The result is a pure function of that order and of the groups' content. It does not depend on which group finished
first, on how long its reward took, or on the number of engines, so that a step can be repeated. Where the configuration
asks for the groups that finish first, it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

from miles_spmd.config import RewardTerm
from miles_spmd.plugins.algorithm import GroupFilter
from miles_spmd.plugins.reward import START, Score, TrainerState
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.types.sample import Prompt, Sample, by_rollout, rollouts

Group = list[Sample]


class Acceptance:
    """The groups of a rollout while they are generated, scored, and accepted or dropped.

    A group is judged by the filter as soon as its rewards arrive, so that more prompts can be submitted early. It is
    accepted or dropped only after every group that was submitted before it; ``first_finished``: at once.
    """

    def __init__(
        self,
        rewards: RewardPool | None,
        count: int,
        accepts: GroupFilter | None = None,
        terms: Sequence[RewardTerm] = (),
        wake: Callable[[], None] = lambda: None,
        keeps_empty: bool = False,
        first_finished: bool = False,
        state: TrainerState = START,
    ) -> None:
        """``rewards``: None scores nothing; ``count``: groups to accept; ``accepts`` must be a function of the group
        alone (None: accept all); ``terms``: other reward functions than those of ``[reward]``; ``wake`` is called, in
        another thread, when a reward has arrived; ``keeps_empty``: a group of which nothing is left is accepted, not
        dropped; ``state``: that of the run, for reward functions."""
        self.accepted: list[Group] = []
        self.dropped = 0  # before the last accepted group
        self._rewards, self._count, self._accepts, self._terms = rewards, count, accepts, terms
        self._wake, self._keeps_empty, self._first_finished = wake, keeps_empty, first_finished
        self._state = state
        self._turns: list[int] = []  # groups in the order in which they were judged
        self._accepted: set[int] = set()  # the numbers of accepted groups
        self.prompts: list[Prompt] = []  # of the groups
        self.groups: list[Group] = []  # in the order of submission; each is complete, or empty
        self._parts: list[list[Group | None]] = []  # of each group, the samples of each episode that has ended
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
    def settled(self) -> bool:
        """Whether every group that was submitted is accepted or dropped."""
        return len(self.accepted) + self.dropped == len(self.groups)

    @property
    def has_news(self) -> bool:
        """Whether a reward has arrived since the last :meth:`resolve`."""
        return not self._scored.empty()

    def add(self, prompts: Sequence[Prompt], episodes: int) -> int:
        """Add a group of so many episodes for each prompt, which are submitted now; returns the number of the first."""
        first = len(self.groups)
        self.prompts += prompts
        self.groups += [[] for _ in prompts]
        self._parts += [[None] * episodes for _ in prompts]
        return first

    def finish(self, number: int, index: int, samples: Group | None) -> None:
        """Take the samples of episode ``index`` of group ``number``; the last one starts the scoring of those that have
        no reward yet. None: the group is dropped."""
        if samples is None:
            self._judged(number, False)
            return
        parts = self._parts[number]
        parts[index] = samples
        if any(part is None for part in parts):
            return
        self.groups[number] = [sample for part in parts for sample in part or ()]
        if not self.groups[number]:
            self._judged(number, self._keeps_empty)
            return
        scores: Future[list[Score]] = Future()
        unscored = _unscored(self.groups[number])
        if unscored and self._rewards is not None:
            scores = self._rewards.submit(unscored, self._terms, self._state)
        else:
            scores.set_result([])
        scores.add_done_callback(lambda scores: self._arrive(number, scores))

    def _arrive(self, number: int, scores: Future[list[Score]]) -> None:
        self._scored.put((number, scores))
        self._wake()

    def describe_dropped(self) -> str:
        """Return in words which rewards the groups had that were dropped."""
        dropped = [group for number, group in enumerate(self.groups) if self._verdicts.get(number) is False]
        equal = Counter(group[0].reward for group in dropped if len({sample.reward for sample in group}) == 1)
        of_equal = [f"{count} with all rewards {reward:g}" for reward, count in equal.most_common(4)]
        failed = sum(not group for group in dropped)
        others = len(dropped) - failed - sum(count for _, count in equal.most_common(4))
        of_failed = [f"{failed} whose environment failed"] if failed else []
        return ", ".join([*of_equal, *of_failed, *([f"{others} others"] if others else [])])

    def resolve(self) -> None:
        """Judge the groups whose rewards have arrived, and accept or drop those whose turn it is.

        Raises the error of a reward or filter in the turn of its group: groups behind the last that is accepted must
        not end the run, because whether they are scored at all depends on time.
        """
        while self.has_news:
            self._judge(*self._scored.get())
        while not self.enough and (turn := self._next_turn()) in self._verdicts:
            verdict = self._verdicts[turn]
            if isinstance(verdict, Exception):
                raise verdict
            if verdict:
                self.accepted.append(self.groups[turn])
                self._accepted.add(turn)
            else:
                self.dropped += 1

    def _next_turn(self) -> int:
        """The group that is accepted or dropped next, -1 where none is judged yet."""
        place = len(self.accepted) + self.dropped
        if not self._first_finished:
            return place
        return self._turns[place] if place < len(self._turns) else -1

    def left(self) -> list[int]:
        """Return the numbers of the groups that were neither accepted nor dropped, nor will be dropped, in order."""
        return [n for n in range(len(self.groups)) if n not in self._accepted and self._verdicts.get(n) in (None, True)]

    def finished(self, number: int) -> list[tuple[int, Group]]:
        """Return the episodes of a group that have ended: index and samples of each."""
        return [(index, part) for index, part in enumerate(self._parts[number]) if part is not None]

    def _judge(self, number: int, scores: Future[list[Score]]) -> None:
        group = self.groups[number]
        try:
            for first, score in zip(_unscored(group), scores.result(), strict=self._rewards is not None):
                first.reward, first.reward_detail = score.value, score.detail
                for turn, reward in enumerate(score.turn_rewards):
                    first.trajectory.reward_turn(reward, turn)
            for first, *others in by_rollout(group):
                for sample in others:
                    sample.reward, sample.reward_detail = first.reward, first.reward_detail
            verdict: bool | Exception = self._accepts is None or bool(self._accepts(group))
        except Exception as error:
            verdict = error
        self._judged(number, verdict)

    def _judged(self, number: int, verdict: bool | Exception) -> None:
        if number not in self._verdicts:
            self._verdicts[number] = verdict
            self._turns.append(number)
            self._rejected += verdict is False


def _unscored(group: Group) -> list[Sample]:
    """Return the first sample of each rollout whose reward the environment has not given."""
    return [first for first in rollouts(group) if first.reward is None]
