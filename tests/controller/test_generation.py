"""Which groups a step trains on, and when more prompts are submitted: a scripted engine decides the order of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spmd.config import Config, RewardTerm
from miles_spmd.controller.cluster.rollout_session import Cache
from miles_spmd.controller.generation.acceptance import Acceptance, Group
from miles_spmd.controller.generation.generation import FilterError, Generation
from miles_spmd.controller.generation.judge import EngineJudge
from miles_spmd.controller.journal.events import EvaluationFinished, Event, PhaseFinished, RolloutFinished
from miles_spmd.controller.journal.stopping import Stopping
from miles_spmd.environments.context import ModelView
from miles_spmd.environments.in_place import InPlace
from miles_spmd.environments.single_turn import single_turn
from miles_spmd.plugins.reward import START, RewardError, Score, TrainerState
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.types.request import Output, Request
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.seeds import sample_seed
from miles_spmd.types.trajectory import FinishReason, Trajectory
from tests.samples import sample_of

SAMPLES = 2
MAX_WAVES = 9


class Engines:
    """A cluster whose engines finish the running request that ``choose`` returns."""

    def __init__(self, choose: Callable[[list[Request]], Request | None]) -> None:
        self.choose = choose
        self.running: list[Request] = []
        self.submitted: list[Request] = []
        self.rollouts: list[tuple[int, str]] = []
        self.running_at_submit: list[list[str]] = []
        self.idle: Callable[[], None] = lambda: None

    @contextmanager
    def rollout(self, step: int, *, purpose: str = "") -> Iterator[Engines]:
        self.rollouts.append((step, purpose))
        yield self
        self.running.clear()

    def cache_of(self, group: int) -> Cache:
        return Cache(0, None)

    def submit(self, requests: Sequence[Request]) -> None:
        self.running_at_submit.append([request.rid for request in self.running])
        self.running += requests
        self.submitted += requests

    def wake(self) -> None:
        """Nobody sleeps."""

    def next(self, interrupt: Callable[[], bool]) -> Output | None:
        if not interrupt() and not self.running:
            self.idle()  # what is waited for comes from elsewhere
        if not self.running or interrupt():
            return None
        chosen = self.choose(self.running)
        if chosen is None:
            return None
        self.running.remove(chosen)
        return Output(chosen.rid, [7], [-1.0], FinishReason.STOP, [(0, 1)])


class Rewards:
    """Scores are there at once, or when the test says so."""

    def __init__(self, value: Callable[[Group], float | None], waits: Callable[[Group], bool] = lambda group: False):
        self.value, self.waits = value, waits
        self.waiting: list[tuple[Group, Future[list[Score]]]] = []

    def submit(
        self, samples: Group, terms: Sequence[RewardTerm] = (), state: TrainerState = START
    ) -> Future[list[Score]]:
        future: Future[list[Score]] = Future()
        self.waiting.append((samples, future))
        if not self.waits(samples):
            self.finish(len(self.waiting) - 1)
        return future

    def finish(self, place: int) -> None:
        group, future = self.waiting.pop(place)
        value = self.value(group)
        if value is None:
            future.set_exception(RewardError(f"no reward for {group[0].prompt.uid}"))
        else:
            future.set_result([Score(value)] * len(group))


class Data:
    """Waves of ``size`` prompts, numbered through."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0
        self.eval_sets = {"held": [Prompt(f"held:{i}", "", [i]) for i in range(size)]}

    def prompts(self, step: int, count: int) -> list[Prompt]:
        """Those of a step are the first wave."""
        return self._wave(0)

    def spare(self, step: int) -> Iterator[list[Prompt]]:
        for wave in range(1, MAX_WAVES):
            yield self._wave(wave)

    def _wave(self, wave: int) -> list[Prompt]:
        self.read += 1
        return [Prompt(str(wave * self.size + i), "", [wave, i]) for i in range(self.size)]


class Events:
    def __init__(self) -> None:
        self.published: list[Event] = []
        self.shown: list[str] = []

    def publish(self, event: Event) -> None:
        self.published.append(event)

    @contextmanager
    def timed(self, phase: str, step: int) -> Iterator[None]:
        yield
        self.publish(PhaseFinished(phase, 0.0))


class Tokenizer:
    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return "text"


def accepts(group: Sequence[Sample]) -> bool:
    return group[0].reward == 1.0


CONFIG = {
    batch_size: Config(
        model={"hf_checkpoint": "none"},
        data={"prompt_data": "none"},
        rollout={"rollout_batch_size": batch_size, "n_samples_per_prompt": SAMPLES},
        algorithm={"dynamic_sampling_filter": "tests.controller.test_generation:accepts"},
        eval={"n_samples_per_eval_prompt": SAMPLES, "eval_prompt_data": {"held": "none"}},
    )
    for batch_size in range(1, 5)
}


def generation(
    engines: Engines,
    rewards: Rewards,
    data: Data,
    events: Events,
    batch_size: int,
    judge: EngineJudge | None = None,
    **algorithm: Any,
) -> Generation:
    stopping = Stopping(Path("none"), {})
    stopping.show = events.shown.append
    host = InPlace(single_turn, ModelView(cast(Any, Tokenizer()), 100, 512, "2026-01-01"))
    parts: tuple[Any, ...] = engines, rewards, data, events, stopping, host
    own = CONFIG[batch_size].algorithm.model_copy(update=algorithm)
    return Generation(CONFIG[batch_size].model_copy(update={"algorithm": own}), *parts, judge)


def waves_in_turn(good: Sequence[bool], batch_size: int, wave_size: int) -> tuple[list[str], int, int]:
    """The rule that is to hold: whole waves one after another until enough groups are accepted. Returns the accepted
    groups, the number of dropped ones, and the number of waves."""
    accepted: list[str] = []
    dropped = waves = 0
    while len(accepted) < batch_size:
        for number in range(waves * wave_size, (waves + 1) * wave_size):
            if len(accepted) < batch_size:
                if good[number]:
                    accepted.append(str(number))
                else:
                    dropped += 1
        waves += 1
    return accepted, dropped, waves


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_accepted_groups_are_a_function_of_content(data: st.DataObject, batch_size: int, wave_size: int) -> None:
    """Whatever finishes first, and however long rewards take, the accepted groups and the waves are those of a rule
    that knows no time."""
    good = data.draw(
        st.lists(st.booleans(), min_size=wave_size * (MAX_WAVES - 4), max_size=wave_size * (MAX_WAVES - 4))
    )
    good += [True] * wave_size * 4  # so that the prompts are always enough
    slow = data.draw(st.sets(st.integers(0, len(good) - 1)))
    rewards = Rewards(lambda g: float(good[int(g[0].prompt.uid)]), lambda g: int(g[0].prompt.uid) in slow)

    def choose(running: list[Request]) -> Request | None:
        while rewards.waiting and data.draw(st.booleans()):
            rewards.finish(data.draw(st.integers(0, len(rewards.waiting) - 1)))
        return data.draw(st.sampled_from(running))

    engines, prompts, events = Engines(choose), Data(wave_size), Events()
    run = generation(engines, rewards, prompts, events, batch_size)
    engines.idle = lambda: rewards.finish(0)
    groups = run.rollout(3)
    expected, dropped, waves = waves_in_turn(good, batch_size, wave_size)
    assert [group[0].prompt.uid for group in groups] == expected
    assert prompts.read == waves
    numbers = [str(i) for i in range(waves * wave_size)]
    assert [r.rid for r in engines.submitted] == [
        f"{n}.{int(n) * SAMPLES + i}.0" for n in numbers for i in range(SAMPLES)
    ]
    (finished,) = [event for event in events.published if isinstance(event, RolloutFinished)]
    assert (finished.step, finished.groups, finished.dropped) == (3, groups, dropped)


def straggler_last(running: list[Request]) -> Request:
    return next((request for request in running if not request.rid.startswith("0.")), running[0])


class Judge(Rewards):
    """Scores when it is called, while it is open."""

    def __init__(self) -> None:
        super().__init__(lambda group: 1.0, waits=lambda group: True)
        self.judged: list[str] = []
        self.is_open = False

    @contextmanager
    def opened(self, step: int, purpose: str) -> Iterator[None]:
        self.is_open = True
        yield
        self.is_open = False

    @property
    def has_news(self) -> bool:
        return bool(self.waiting)

    def take(self) -> None:
        assert self.is_open
        while self.waiting:
            self.judged.append(self.waiting[0][0][0].prompt.uid)
            self.finish(0)


def test_responses_are_judged_while_others_are_generated() -> None:
    judge, seen = Judge(), list[list[str]]()

    def choose(running: list[Request]) -> Request:
        seen.append([*judge.judged])
        return straggler_last(running)

    groups = generation(Engines(choose), judge, Data(4), Events(), 4, judge=cast(Any, judge)).rollout(0)
    assert [group[0].prompt.uid for group in groups] == ["0", "1", "2", "3"]
    assert seen[-1] == ["1", "2", "3"]
    assert not judge.is_open


def test_more_prompts_are_submitted_while_a_straggler_runs() -> None:
    """Group 1 of four is dropped: then a second wave is certain to be needed, although group 0 is still generating."""
    engines, rewards = Engines(straggler_last), Rewards(lambda g: float(g[0].prompt.uid != "1"))
    groups = generation(engines, rewards, Data(4), Events(), 4).rollout(0)
    first, refill = engines.running_at_submit
    assert (first, {"0.0.0", "0.1.0"} <= set(refill)) == ([], True)
    assert [group[0].prompt.uid for group in groups] == ["0", "2", "3", "4"]


def test_a_reward_that_arrives_while_a_straggler_runs_leads_to_a_refill() -> None:
    """Engines that have nothing to return are left as soon as there is a reward to look at."""
    rewards = Rewards(lambda g: float(g[0].prompt.uid != "1"), lambda g: g[0].prompt.uid == "1")
    polled: list[bool] = []

    def choose(running: list[Request]) -> Request | None:
        if rewards.waiting and [request.rid for request in running] == ["0.0.0", "0.1.0"]:
            polled.append(True)
            rewards.finish(0)
            return None
        return straggler_last(running)

    engines = Engines(choose)
    groups = generation(engines, rewards, Data(2), Events(), 2).rollout(0)
    assert polled == [True]
    assert engines.running_at_submit == [[], ["0.0.0", "0.1.0"]]
    assert [group[0].prompt.uid for group in groups] == ["0", "2"]


@pytest.mark.parametrize(("too_few", "kept"), [("train", ["3"]), ("skip", [])])
def test_too_few_groups(too_few: str, kept: list[str]) -> None:
    """All waves together have one good group of the two that are needed."""
    rewards, events = Rewards(lambda g: float(g[0].prompt.uid == "3")), Events()
    first = Engines(lambda running: running[0])
    groups = generation(first, rewards, Data(2), events, 2, too_few_groups=too_few).rollout(7)
    assert [group[0].prompt.uid for group in groups] == kept
    (text,) = events.shown
    assert text.startswith("warning: step 7: 1 of 18 groups were kept, of which 2 are needed; dropped: 17 with all rew")


def test_too_few_groups_can_end_the_run() -> None:
    first, rewards = Engines(lambda running: running[0]), Rewards(lambda g: 0.0)
    with pytest.raises(FilterError, match="0 of 18 groups were kept"):
        generation(first, rewards, Data(2), Events(), 2, too_few_groups="stop").rollout(7)


def test_a_reward_of_the_environment_stays_beside_those_of_functions() -> None:
    """The functions score the samples of a group that have none."""
    asked: list[Group] = []

    def value(group: Group) -> float:
        asked.append(group)
        return 0.25

    for rewards in ([1.0, None], [None, 1.0], [1.0, 2.0], [None, None]):
        asked.clear()
        acceptance = Acceptance(cast(RewardPool, Rewards(value)), 1)
        acceptance.add([Prompt("a", "", [1])], 2)
        group = [sample_of(Prompt("a", "", [1]), index, [7], reward=reward) for index, reward in enumerate(rewards)]
        sibling = sample_of(Prompt("a", "", [1]), 0, [8])
        acceptance.finish(0, 0, [group[0], sibling])
        acceptance.finish(0, 1, [group[1]])
        acceptance.resolve()
        expected = [0.25 if reward is None else reward for reward in rewards]
        assert [sample.reward for sample in (*group, sibling)] == [*expected, expected[0]]
        unscored = [sample for sample, reward in zip(group, rewards) if reward is None]
        assert asked == ([unscored] if unscored else [])


def test_an_error_of_a_reward_counts_in_its_turn() -> None:
    """A group that is not needed cannot end a run; one that is needed does, whatever finished after it."""

    def value(group: Group) -> float | None:
        return None if group[0].prompt.uid == "3" else 1.0

    last = Engines(lambda running: running[-1])
    groups = generation(last, Rewards(value), Data(4), Events(), 3).rollout(0)
    assert [group[0].prompt.uid for group in groups] == ["0", "1", "2"]
    with pytest.raises(RewardError, match="no reward for 3"):
        generation(last, Rewards(value), Data(4), Events(), 4).rollout(0)


def test_the_reward_that_an_environment_gives_counts_in_a_group_where_others_give_none() -> None:
    scored: list[list[int]] = []

    def value(group: Group) -> float:
        scored.append([sample.index for sample in group])
        return 0.5

    acceptance = Acceptance(cast(Any, Rewards(value)), 1)
    prompt = Prompt("p:0", "", [1])
    acceptance.add([prompt], 3)
    for index, reward in enumerate([None, 2.0, None]):
        siblings = [Sample(prompt, index, Trajectory([1], number=number)) for number in range(2)]
        siblings[0].reward = reward
        acceptance.finish(0, index, siblings)
    acceptance.resolve()
    assert scored == [[0, 2]]
    assert [sample.reward for sample in acceptance.accepted[0]] == [0.5, 0.5, 2.0, 2.0, 0.5, 0.5]


def test_dropped_groups_are_described() -> None:
    acceptance = Acceptance(cast(Any, Rewards(lambda group: 0.5)), 1, accepts=lambda group: False)
    prompts = [Prompt(f"p:{i}", "", [1]) for i in range(3)]
    acceptance.add(prompts, 1)
    acceptance.finish(0, 0, None)  # its environment has failed
    for group, reward in ((1, None), (2, 0.5)):
        acceptance.finish(group, 0, [Sample(prompts[group], 0, Trajectory([1]), reward)])
    acceptance.resolve()
    assert acceptance.describe_dropped() == "2 with all rewards 0.5, 1 whose environment failed"


def test_an_evaluation_has_the_seeds_of_step_0_and_is_named() -> None:
    engines, events = Engines(lambda running: running[-1]), Events()
    parts = generation(engines, Rewards(lambda g: float(g[0].prompt.uid == "held:1")), Data(2), events, 2)
    parts.evaluate(40, CONFIG[2].eval_sets)
    assert engines.rollouts == [(40, "evaluation of held")]
    seeds = [request.sampling.seed for request in engines.submitted]
    uids = [f"held:{i}" for i in range(2) for _ in range(SAMPLES)]
    assert seeds == [sample_seed(1234, 0, uid, i % SAMPLES) for i, uid in enumerate(uids)]
    finished = cast(EvaluationFinished, events.published[-1])
    assert finished.step == 40
    assert finished.metrics["eval/held"] == 0.5
    assert [group[0].prompt.uid for group in finished.samples["held"]] == ["held:0", "held:1"]
