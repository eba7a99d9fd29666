"""Trajectories as the run holds them, whatever the environment does: a scripted policy samples for it."""

from __future__ import annotations

import itertools
import random
from typing import Any, cast

import msgspec
import pytest

from miles_spmd.config import Config
from miles_spmd.config.environment import EnvironmentConfig
from miles_spmd.controller.generation.durable import DurableRollout
from miles_spmd.controller.generation.episodes import Done, EnvironmentFailedError, Episodes, joined_versions
from miles_spmd.controller.generation.sampling import Sampling
from miles_spmd.controller.generation.unfinished import Response
from miles_spmd.controller.learning.batch import to_sequences
from miles_spmd.environments.context import ModelView
from miles_spmd.environments.in_place import InPlace
from miles_spmd.ledger.step_data import SampleData
from miles_spmd.plugins.environment import Context
from miles_spmd.types.request import Output, Request
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory, by_version

CONFIG = Config(
    model={"hf_checkpoint": "none"},
    data={"prompt_data": "none"},
    rollout={"rollout_max_response_len": 40, "n_samples_per_prompt": 2},
)


class Tokenizer:
    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


async def tangle(context: Context, prompt: Prompt) -> Any:
    """A conversation with given tokens, branches, a sub-agent, turns with a reward and one that is not trained, at
    random."""
    generator = random.Random(f"{prompt.uid}.{context.index}")
    trajectories = [context.begin(prompt.tokens)]
    for _ in range(generator.randrange(1, 9)):
        current = generator.choice(trajectories)
        match generator.randrange(5):
            case 0:
                current.append(Segment([generator.randrange(90, 99) for _ in range(3)], sampled=False))
            case 1:
                trajectories.append(context.fork(current))
            case 2:
                trajectories.append(context.begin([1, generator.randrange(9)]))
            case _:
                await context.complete(current, max_new_tokens=generator.choice([None, 4]), stop=["x"])
                if current.turns and generator.random() < 0.5:
                    current.reward_turn(generator.randrange(-4, 5) / 4)
    await context.complete(trajectories[0])
    last = trajectories[0].segments
    if last and last[-1].sampled and generator.random() < 0.3:
        last[-1] = msgspec.structs.replace(last[-1], trained=False)
        context.count("untrained")
    return trajectories


def output(request: Request) -> Output:
    """The response of a policy that is a function of the request, but for its rid."""
    generator = random.Random(f"{request.input_ids} {request.sampling.seed}")
    tokens = [
        generator.randrange(10, 90) for _ in range(min(request.sampling.max_new_tokens, generator.randrange(1, 8)))
    ]
    return Output(request.rid, tokens, [-t / 100 for t in tokens], FinishReason.STOP, [(3, len(tokens))])


def play(
    environment: Any,
    prompts: list[Prompt],
    *,
    order: int = 0,
    given: dict[str, Response] | None = None,
    durable: DurableRollout | None = None,
    purpose: str = "",
    **limits: Any,
) -> tuple[list[Done], Episodes, list[Request]]:
    """Run one rollout; outputs arrive in a random ``order``."""
    host, generator = (
        InPlace(environment, ModelView(cast(Any, Tokenizer()), 100, 512, "2026-01-01")),
        random.Random(order),
    )
    settings = EnvironmentConfig(**limits)
    episodes, sampling = Episodes(host, itertools.count(), settings), Sampling.of_step(CONFIG, 3)
    episodes.open(given, purpose, durable)
    episodes.begin(0, prompts, sampling)
    running, asked, done = list[Request](), list[Request](), list[Done]()
    while True:
        new = episodes.requests()
        running, asked, done = running + new, asked + new, done + episodes.take_finished()
        if not running and not episodes.has_news:
            return sorted(done, key=lambda one: (one.group, one.index)), episodes, asked
        if running:
            episodes.complete(output(running.pop(generator.randrange(len(running)))))


def play_in_parts(order: int) -> tuple[list[Done], int]:
    """As :func:`play`, but everything is cut at random points and continued in the next rollout. Returns how often."""
    host, generator = InPlace(tangle, ModelView(cast(Any, Tokenizer()), 100, 512, "2026-01-01")), random.Random(order)
    episodes, sampling = Episodes(host, itertools.count(), EnvironmentConfig()), Sampling.of_step(CONFIG, 3)
    episodes.begin(0, PROMPTS, sampling)
    running, done, cuts = list[Request](), list[Done](), 0
    while True:
        running += episodes.requests()
        done += episodes.take_finished()
        if not running and not episodes.has_news:
            return sorted(done, key=lambda one: (one.group, one.index)), cuts
        if running and generator.random() < 0.2:
            for request in running:
                full, begun = output(request), request.begun
                end = generator.randrange(len(begun.output_ids) if begun else 0, len(full.output_ids))
                versions = [(4, end)]  # an engine takes the tokens that it was given for its own
                episodes.complete(
                    Output(
                        request.rid, full.output_ids[:end], full.output_log_probs[:end], FinishReason.ABORT, versions
                    )
                )
            running, cuts = [], cuts + 1
            episodes.close(range(len(PROMPTS)))
            episodes.open()
        elif running:
            request = running.pop(generator.randrange(len(running)))
            full = output(request)
            assert request.begun is None or full.output_ids[: len(request.begun.output_ids)] == request.begun.output_ids
            episodes.complete(full)


PROMPTS = [Prompt(f"data:{i}", "", [5, i]) for i in range(12)]


def of(done: list[Done]) -> list[Sample]:
    return [sample for one in done for sample in one.samples or ()]


def test_a_rollout_is_a_function_of_its_prompts() -> None:
    """Whatever finishes first; and it repeats from the responses alone, complete or not."""
    done, episodes, asked = play(tangle, PROMPTS)
    again, _, _ = play(tangle, PROMPTS, order=1)
    assert again == done
    responses = episodes.responses(3)
    assert len(responses) == len(asked) > 2 * len(PROMPTS)
    replayed, _, of_replay = play(tangle, PROMPTS, order=2, given=responses)
    assert (replayed, of_replay) == (done, [])
    few = dict(itertools.islice(responses.items(), len(responses) // 2))
    continued, _, rest = play(tangle, PROMPTS, order=3, given=few)
    assert (continued, len(rest)) == (done, len(asked) - len(few))


def test_what_is_trained_is_what_was_sampled_once() -> None:
    """Every sampled token is behind the tokens that its request had, and trained in one trajectory of its episode."""
    done, _, asked = play(tangle, PROMPTS)
    made = {(tuple(request.input_ids), tuple(output(request).output_ids)) for request in asked}
    found = set()
    for one in done:
        trained = 0
        distinct: set[tuple[int, ...]] = set()
        for sample in one.samples or ():
            (sequence,) = to_sequences([sample])
            prefix = tuple(sample.trajectory.start)
            mask = [0] * len(prefix)
            for segment in sample.trajectory.segments:
                if segment.sampled:
                    assert (prefix, tuple(segment.tokens)) in made
                    assert segment.log_probs == [-token / 100 for token in segment.tokens]
                    found.add((prefix, tuple(segment.tokens)))
                    distinct.add(id(segment.log_probs))  # type: ignore[arg-type]
                    trained += segment.trained
                prefix += tuple(segment.tokens)
                mask += [int(segment.sampled and segment.trained)] * len(segment.tokens)
            assert sequence.tokens.tolist() == list(prefix)
            assert sequence.loss_weights.tolist() == mask
        left_out = (one.samples or [])[0].trajectory.metrics.get("untrained", 0)
        assert trained == len(distinct) - left_out
    assert found <= made
    assert len({request.sampling.seed for request in asked}) == len(asked)


@pytest.mark.parametrize("order", range(5))
def test_what_is_cut_and_continued_is_the_same(order: int) -> None:
    whole, _, _ = play(tangle, PROMPTS)
    parts, cuts = play_in_parts(order)
    assert cuts > 3
    for one, other in zip(parts, whole, strict=True):
        assert (one.group, one.index) == (other.group, other.index)
        for sample, uncut in zip(one.samples or (), other.samples or (), strict=True):
            assert sample.trajectory.tokens == uncut.trajectory.tokens
            assert sample.rollout_log_probs == uncut.rollout_log_probs
            assert sample.loss_mask == uncut.loss_mask
            counts = [sum(count for _, count in s.weight_versions) for s in sample.trajectory.segments if s.sampled]
            assert counts == [len(s.tokens) for s in sample.trajectory.segments if s.sampled]
    assert any(len(s.weight_versions) > 1 for one in parts for s in one.samples or ())


def test_versions_of_what_was_continued() -> None:
    assert joined_versions([(1, 3)], [(2, 5)]) == [(1, 3), (2, 2)]
    assert joined_versions([(1, 3), (2, 1)], [(2, 6)]) == [(1, 3), (2, 3)]
    assert joined_versions([], [(2, 6)]) == [(2, 6)]
    assert joined_versions([(1, 4)], [(2, 4)]) == [(1, 4)]
    segment = Segment([1, 2, 3], log_probs=[-1.0, -2.0, -3.0], weight_versions=[(1, 2), (2, 1)], reward=0.5)
    old, new = by_version(segment, 2)
    assert (old.tokens, old.log_probs, old.trained) == ([1, 2], [-1.0, -2.0], False)
    assert (new.tokens, new.log_probs, new.trained, new.weight_versions) == ([3], [-3.0], True, [(2, 1)])
    assert (old.reward, new.reward) == (None, 0.5)


def test_the_ledger_keeps_trajectories_whole() -> None:
    done, _, _ = play(tangle, PROMPTS)
    samples = of(done)
    kept = SampleData.of(samples, 0).samples({prompt.uid: prompt for prompt in PROMPTS})
    for sample, own in zip(kept, samples, strict=True):
        assert sample.trajectory.start == own.trajectory.start
        assert [
            (s.tokens, s.sampled, s.trained, s.weight_versions) for s in sample.trajectory.segments if s.tokens
        ] == [(s.tokens, s.sampled, s.trained, s.weight_versions) for s in own.trajectory.segments if s.tokens]
        assert sample.rollout_log_probs == pytest.approx(own.rollout_log_probs)
        assert (sample.reward, sample.trajectory.turn_rewards) == (own.reward, own.trajectory.turn_rewards)


def test_the_reward_of_an_episode_is_the_sum_of_its_turns() -> None:
    done, _, _ = play(tangle, PROMPTS)
    found = 0
    for one in done:
        of_turns = dict[tuple[tuple[int, ...], ...], float]()  # by the tokens up to the turn's end
        for sample in one.samples or ():
            before = (tuple(sample.trajectory.start),)
            for segment in sample.trajectory.segments:
                before = (*before, tuple(segment.tokens))
                if segment.reward is not None:
                    assert segment.sampled
                    of_turns[before] = segment.reward
        expected = sum(of_turns.values()) if of_turns else None
        assert [sample.reward for sample in one.samples or ()] == [expected] * len(one.samples or ())
        found += len(of_turns)
    assert found > len(PROMPTS)


def rewarding(*rewards: Any, whole: Any = None, after_fork: Any = None) -> Any:
    async def environment(context: Context, prompt: Prompt) -> Any:
        trajectory = context.begin(prompt.tokens)
        trajectory.reward = whole
        for reward in rewards:
            await context.complete(trajectory, max_new_tokens=3)
            if reward is not None:
                trajectory.reward_turn(reward)
        if after_fork is None:
            return trajectory
        sibling = context.fork(trajectory)
        sibling.reward_turn(after_fork)
        return [trajectory, sibling]

    return environment


def test_rewards_of_turns() -> None:
    done, _, _ = play(rewarding(1, None, -0.25), PROMPTS[:1])
    assert [(sample.reward, sample.trajectory.turn_rewards) for sample in of(done)] == [(0.75, [1.0, None, -0.25])] * 2
    done, _, _ = play(rewarding(1, 0, whole=5), PROMPTS[:1])
    assert [(sample.reward, sample.trajectory.turn_rewards) for sample in of(done)] == [(5.0, [1.0, 0.0])] * 2
    done, _, _ = play(rewarding(None, None), PROMPTS[:1])
    assert [(sample.reward, sample.trajectory.turn_rewards) for sample in of(done)] == [(None, [])] * 2


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        (rewarding(1, float("nan")), "gave 'turn reward' the value nan"),
        (rewarding(1, whole=float("inf")), "gave 'reward' the value inf"),
        (rewarding("high"), "gave 'turn reward' the value 'high'"),
        (rewarding(1, 2, after_fork=3), "gave a turn that siblings have in common two different rewards"),
    ],
)
def test_rewards_that_cannot_be_used(environment: Any, problem: str) -> None:
    with pytest.raises(EnvironmentFailedError, match=problem):
        play(environment, PROMPTS[:1], on_environment_failure="stop")


def test_rewards_of_turns_survive_an_interruption() -> None:
    """Those of a reward function, which came after the environment had returned."""
    done, episodes, _ = play(rewarding(None, None), PROMPTS[:2])
    for number, sample in enumerate(of(done)):
        sample.reward = 2.0 + number
        for turn in range(sample.turns):
            sample.trajectory.reward_turn(turn + number / 2, turn)
    again, _, rest = play(rewarding(None, None), PROMPTS[:2], given=episodes.responses(3))
    assert (again, rest) == (done, [])


def test_the_turn_of_a_token() -> None:
    line = Trajectory([1, 2], [Segment([3]), Segment([4, 5], sampled=False), Segment([6, 7])])
    assert [line.turn_at(place)[0] for place in (2, 5, 6)] == [0, 1, 1]
    for place in (0, 1, 3, 4, 7):
        with pytest.raises(ValueError, match="was not sampled"):
            line.turn_at(place)


class Unlucky:
    """Fails for one sample, the first ``times`` times."""

    def __init__(self, times: int) -> None:
        self.times, self.calls = times, 0

    async def __call__(self, context: Context, prompt: Prompt) -> Trajectory:
        trajectory = context.begin(prompt.tokens)
        await context.complete(trajectory)
        if (prompt.uid, context.index) == ("data:1", 1):
            self.calls += 1
            if self.calls <= self.times:
                raise OSError("no network")
        return trajectory


@pytest.mark.parametrize(
    ("times", "policy", "expected"),
    [(1, "replace", [1, 1]), (2, "replace", [None]), (2, "mask", [1, 0])],
)
def test_an_episode_that_fails(times: int, policy: str, expected: list[int | None]) -> None:
    done, episodes, asked = play(Unlucky(times), PROMPTS, on_environment_failure=policy)
    assert len(asked) == 24  # another attempt is given the responses of the one before
    of_group = [one.samples if one.samples is None else len(one.samples) for one in done if one.group == 1]
    assert of_group == expected
    assert [len(one.samples or ()) for one in done if one.group != 1] == [1] * 22
    assert episodes.failures == {"raised": times}
    undisturbed, _, _ = play(Unlucky(0), PROMPTS)
    assert [one for one in done if one.group != 1] == [one for one in undisturbed if one.group != 1]


def test_failures_that_end_a_run() -> None:
    what = "environment 'single_turn' on prompt data:1, sample 1, raised OSError: no network"
    with pytest.raises(EnvironmentFailedError, match=what):
        play(Unlucky(2), PROMPTS, on_environment_failure="stop")
    with pytest.raises(
        EnvironmentFailedError, match=r"1 of 24 episodes of a rollout have failed, a larger share than .* 0.04;"
    ):
        play(Unlucky(2), PROMPTS, max_environment_failures=0.04)


async def overflowing(context: Context, prompt: Prompt) -> Trajectory:
    trajectory = context.begin([1] * 510)
    while completion := (await context.complete(trajectory)).tokens:
        assert len(completion) <= 2
    return trajectory


def test_a_trajectory_ends_where_the_context_does() -> None:
    done, _, asked = play(overflowing, PROMPTS[:1])
    assert all(1 <= request.sampling.max_new_tokens <= 2 for request in asked)
    for sample in of(done):
        assert len(sample.trajectory.tokens) == 512
        assert sample.finish_reason is FinishReason.LENGTH
