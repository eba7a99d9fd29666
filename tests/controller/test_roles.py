"""Several players in one episode: what each of them samples, is given, receives and is compared with."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from miles_spmd.algorithms.rewards import overlong_penalty, reward_nonzero_std
from miles_spmd.config import Config
from miles_spmd.controller.generation.acceptance import Acceptance, Group
from miles_spmd.controller.generation.episodes import EnvironmentFailedError
from miles_spmd.controller.journal.metrics import eval_metrics, rollout_metrics
from miles_spmd.controller.learning.batch import optimizer_steps, to_sequences
from miles_spmd.controller.learning.policy import Policy
from miles_spmd.ledger.step_data import SampleData
from miles_spmd.plugins.environment import Context
from miles_spmd.telemetry.metrics import describe, is_score
from miles_spmd.types.sample import Prompt, Sample, by_role, by_rollout
from miles_spmd.types.trajectory import Segment, Trajectory
from tests.controller.test_episodes import of, play
from tests.controller.test_generation import Rewards
from tests.samples import sample_of

PROMPTS = [Prompt(f"data:{i}", "", [5, i], metadata={"game": f"game {i % 2}"}) for i in range(12)]
ROLES = ("first", "second", "third")


async def match(context: Context, prompt: Prompt) -> list[Trajectory]:
    """Up to three players in turn, who are given what the others have said; some branch, and some rewards come late."""
    generator = random.Random(f"{prompt.uid}.{context.index}")
    players = {role: [context.begin([1, *prompt.tokens, place], role=role)] for place, role in enumerate(ROLES)}
    for turn in range(generator.randrange(1, 9)):
        own = players[ROLES[turn % len(ROLES)]]
        completion = await context.complete(own[-1], max_new_tokens=4)
        if generator.random() < 0.4:
            own[-1].reward_turn(generator.randrange(-4, 5) / 4)
        for others in players.values():
            if others is not own:
                others[-1].append(Segment([*completion.tokens], sampled=False))
        if generator.random() < 0.3:
            own.append(context.fork(own[-1]))
    for trajectories in players.values():
        if generator.random() < 0.6:
            trajectories[0].reward = generator.randrange(-4, 5) / 4
    context.count("matches")
    return [one for trajectories in players.values() for one in trajectories if one.turns]


# --- episodes --------------------------------------------------------------------------------------------------------


def test_every_player_has_its_own_trajectories_and_trains_what_it_sampled() -> None:
    done, episodes, asked = play(match, PROMPTS)
    assert play(match, PROMPTS, order=1)[0] == done
    assert play(match, PROMPTS, order=2, given=episodes.responses(3))[0] == done
    trained: Counter[tuple[int, ...]] = Counter()
    for sample in of(done):
        assert sample.trajectory.start[-1] == ROLES.index(sample.role)
        (sequence,) = to_sequences([sample])
        expected = [0] * len(sample.trajectory.start)
        for segment in sample.trajectory.segments:
            expected += [int(segment.sampled and segment.trained)] * len(segment.tokens)
            trained[tuple(segment.log_probs)] += segment.sampled and segment.trained
        assert sequence.loss_weights.tolist() == expected
    assert trained.total() == len(asked)  # each response once: what siblings have in common, in one of them


def test_the_rewards_of_each_role() -> None:
    """What the environment has given a role's first trajectory, else the sum over its own turns, each once."""
    kinds: Counter[str] = Counter()
    for one in play(match, PROMPTS)[0]:
        for rollout in by_rollout(one.samples or []):
            given = _given(rollout[0])
            turns = {id(s.log_probs): s.reward for own in rollout for s in own.trajectory.segments if s.sampled}
            rewards = [reward for reward in turns.values() if reward is not None]
            kinds["given" if given is not None else "turns" if rewards else "functions"] += 1
            expected = given if given is not None else math.fsum(rewards) if rewards else None
            assert rollout[0].reward == expected
    assert min(kinds[kind] for kind in ("given", "turns", "functions")) > 3


def _given(sample: Sample) -> float | None:
    """The reward that ``match`` gives to a role, from the same random numbers."""
    generator = random.Random(f"{sample.prompt.uid}.{sample.index}")
    for _ in range(generator.randrange(1, 9)):
        if generator.random() < 0.4:
            generator.randrange(-4, 5)
        generator.random()
    rewards = {role: generator.randrange(-4, 5) / 4 if generator.random() < 0.6 else None for role in ROLES}
    return rewards[sample.role]


def test_rewards_of_functions_survive_an_interruption_role_by_role() -> None:
    done, episodes, _ = play(match, PROMPTS[:4])
    for number, rollout in enumerate(by_rollout(of(done))):
        if rollout[0].reward is None:
            rollout[0].reward, rollout[0].reward_detail = 10.0 + number, {"words": number}
    again, _, rest = play(match, PROMPTS[:4], given=episodes.responses(3))
    assert (again, rest) == (done, [])


def test_functions_score_the_first_sample_of_each_role_without_a_reward() -> None:
    asked: list[list[tuple[int, str]]] = []

    def value(group: Group) -> float:
        asked.append([(sample.index, sample.role) for sample in group])
        return 0.25

    acceptance = Acceptance(cast(Any, Rewards(value)), 1)
    prompt = Prompt("p:0", "", [1])
    acceptance.add([prompt], 2)
    for index in range(2):
        a, sibling, b = (Sample(prompt, index, Trajectory([1], role=role)) for role in ("a", "a", "b"))
        b.reward = 3.0 if index else None
        acceptance.finish(0, index, [a, sibling, b])
    acceptance.resolve()
    assert asked == [[(0, "a"), (0, "b"), (1, "a")]]
    assert [sample.reward for sample in acceptance.accepted[0]] == [0.25, 0.25, 0.25, 0.25, 0.25, 3.0]


def misuse(change: Callable[[Context, Trajectory, Trajectory], Any]) -> Any:
    async def environment(context: Context, prompt: Prompt) -> Any:
        first, second = (context.begin(prompt.tokens, role=role) for role in ROLES[:2])
        await context.complete(first)
        change(context, first, second)
        return [first, second]

    return environment


def _rename(context: Context, first: Trajectory, second: Trajectory) -> None:
    first.role = "second"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda context, first, second: context.begin([1], role=7),
            "began a trajectory of the role 7; a role is print",
        ),
        (lambda context, first, second: context.begin([1], role="a\n"), "a role is printable text"),
        (_rename, "a trajectory has another role than it began with"),
        (
            lambda context, first, second: second.append(first.segments[0]),
            "a trajectory of the role 'second' has a segment that 'first' sampled; what others say is given",
        ),
    ],
)
def test_what_environments_get_wrong(change: Any, problem: str) -> None:
    with pytest.raises(EnvironmentFailedError, match=problem):
        play(misuse(change), PROMPTS[:1], on_environment_failure="stop")


# --- ledger and metrics ----------------------------------------------------------------------------------------------


def test_the_ledger_keeps_roles() -> None:
    samples = of(play(match, PROMPTS)[0])
    data = SampleData.of(samples, 0)
    kept = data.samples({prompt.uid: prompt for prompt in PROMPTS})
    assert [sample.rollout for sample in kept] == [sample.rollout for sample in samples]
    before = data.digests(1, 2)
    data.roles[3] = "third" if data.roles[3] == "first" else "first"
    after = data.digests(1, 2)
    assert (after.requests != before.requests, after.responses) == (True, before.responses)


def test_metrics_of_roles() -> None:
    def sample(index: int, role: str, reward: float, length: int = 1) -> Sample:
        return Sample(Prompt("a:1", "", []), index, Trajectory([1], [Segment([5] * length)], role=role), reward)

    group = [sample(0, "first", 1.0), sample(0, "second", -1.0, 3), sample(1, "first", 1.0), sample(1, "second", 0.5)]
    group[0].trajectory.metrics = {"moves": 4.0}
    metrics = rollout_metrics([group])
    expected = {
        "rollout/role/first/reward": 1.0,
        "rollout/role/second/reward": -0.25,
        "rollout/role/second/response_len": 2.0,
        "rollout/zero_std_ratio": 0.5,  # of the two groups one, the first players', has no gradient
        "rollout/env/moves": 2.0,  # a mean over episodes
        "rollout/raw_reward": 0.375,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    metrics = eval_metrics({"a-b": [group]})
    assert metrics["eval/a-b-pass@2"] == 0.5  # of the two players one has won
    assert metrics["eval/a-b-role/first/reward"] == 1.0
    assert describe("eval/a-b-role/first/reward").meaning == "Mean reward of the role first on a-b"
    assert describe("rollout/role/x/response_len").unit == "tokens"
    assert not is_score("eval/a-b-role/first/reward")


# --- advantages ------------------------------------------------------------------------------------------------------


def config(size: int | None = None, **algorithm: Any) -> Config:
    return Config(
        model={"hf_checkpoint": "none"},
        data={"prompt_data": "none"},
        rollout={"rollout_max_response_len": 40},
        algorithm=algorithm,
        train={"global_batch_size": size},
    )


def scored() -> list[Sample]:
    """All samples of a rollout; what reward functions would score gets a random reward."""
    samples, generator = of(play(match, PROMPTS)[0]), random.Random(0)
    for first, *others in by_rollout(samples):
        first.reward = generator.gauss(0, 1) if first.reward is None else first.reward
        for sample in others:
            sample.reward = first.reward
    return samples


def trained_tokens(samples: list[Sample]) -> int:
    return sum(sum(sample.loss_mask) for sample in samples)


def test_a_role_is_compared_with_the_same_role_of_its_prompt() -> None:
    """GRPO against plain loops: (r - mean) / (std + 1e-6) over the rollouts of one prompt and one role."""
    samples = scored()
    rewards: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for sample in samples:
        rewards[sample.prompt.uid, sample.role][sample.index] = cast(float, sample.reward)
    sequences = to_sequences(samples)
    (batch,), metrics, _ = optimizer_steps(samples, sequences, {}, config())
    for sample, sequence in zip(samples, batch, strict=True):
        group = list(rewards[sample.prompt.uid, sample.role].values())
        mean = sum(group) / len(group)
        spread = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1)) if len(group) > 1 else 0.0
        expected = 0.0 if len(set(group)) == 1 else (cast(float, sample.reward) - mean) / (spread + 1e-6)
        mask = [0] * len(sample.trajectory.start) + sample.loss_mask
        assert sequence.advantages is not None
        np.testing.assert_allclose(sequence.advantages, [expected * one for one in mask], rtol=1e-6)
    assert metrics["rollout/zero_std_groups"] == sum(len(set(group.values())) == 1 for group in rewards.values())


def test_moving_averages_of_game_and_role_go_on_from_rollout_to_rollout() -> None:
    """RAE against plain loops over two rollouts; the second begins where the first has ended."""
    samples, decay = scored(), 0.8
    half = next(i for i, sample in enumerate(samples) if sample.prompt.uid == "data:6")
    run, baselines, expected = config(advantage_estimator="rae", rae_decay=decay), {}, dict[tuple[str, str], float]()
    for part in (samples[:half], samples[half:]):
        steps, metrics, baselines = optimizer_steps(part, to_sequences(part), {}, run, baselines)
        advantages: dict[tuple[str, int, str], float] = {}
        for sample in part:
            if sample.rollout in advantages:
                continue
            player = sample.prompt.metadata["game"], sample.role
            expected[player] = decay * expected.get(player, 0.0) + (1 - decay) * cast(float, sample.reward)
            advantages[sample.rollout] = cast(float, sample.reward) - expected[player]
        for sample, sequence in zip(part, steps[0], strict=True):
            mask = [0] * len(sample.trajectory.start) + sample.loss_mask
            np.testing.assert_allclose(sequence.advantages, [advantages[sample.rollout] * m for m in mask], rtol=1e-6)
        for (game, role), baseline in expected.items():
            assert baselines[game][role] == pytest.approx(baseline, rel=1e-12)
            assert metrics[f"rollout/baseline/{game}/{role}"] == pytest.approx(baseline, rel=1e-12)
    assert len(expected) == 2 * len(ROLES)


def test_every_rollout_counts_once_and_an_episode_stays_in_one_step() -> None:
    samples = scored()
    batches, _, _ = optimizer_steps(samples, to_sequences(samples), {}, config(size=8))
    assert len(batches) == 3  # of 24 episodes
    start = 0
    for batch in batches:
        part = samples[start : start + len(batch)]
        start += len(batch)
        assert len({sample.rollout[:2] for sample in part}) == 8
        weights: Counter[tuple[str, int, str]] = Counter()
        for sample, sequence in zip(part, batch, strict=True):
            weights[sample.rollout] += float(sequence.loss_weights.sum())
        of_each = [1 / len(weights)] * len(weights)
        trained = {name for name in weights if trained_tokens([s for s in part if s.rollout == name])}
        assert [weights[name] for name in weights if name in trained] == pytest.approx(of_each[: len(trained)])


def test_a_group_is_kept_for_the_role_that_has_a_gradient() -> None:
    def group(*rewards: tuple[str, float]) -> list[Sample]:
        return [
            Sample(Prompt("a", "", [1]), index, Trajectory([1], role=role), reward)
            for index, (role, reward) in enumerate(rewards)
        ]

    lost = group(("first", -1), ("second", 1), ("first", -1), ("second", 1))
    assert not reward_nonzero_std(lost)  # although -1 and 1 differ
    assert reward_nonzero_std([*lost, *group(("second", -1.0))])
    assert [len(part) for part in by_role(lost)] == [2, 2]


def test_the_longest_sibling_of_a_role_is_punished_and_not_the_other_role() -> None:
    lengths = [("first", 40), ("first", 2), ("second", 3)]
    samples = [
        sample_of(Prompt("a", "", [1]), index, [7] * length, reward=0.0) for index in range(2) for _, length in lengths
    ]
    for sample, (role, _) in zip(samples, lengths * 2):
        sample.trajectory.role = role
    samples[-1].reward = 1.0
    for sample in samples[3:5]:
        sample.reward = 0.5
    run = config(overlong_buffer_len=20, advantage_estimator="rae", rae_decay=0.0)  # then b is the reward itself
    _, _, baselines = optimizer_steps(samples, to_sequences(samples), {}, run)
    penalty = float(overlong_penalty(np.asarray([40]), 40, 20)[0])
    assert baselines == {"": {"first": 0.5 + penalty, "second": 1.0}}


def test_a_policy_whose_roles_never_come_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A role that is misspelt in the configuration: one policy plays all, and the other one learns nothing."""
    table: Any = {"second_num_gpus": 1, "second_roles": ["secnod"]}
    config = Config(model={"hf_checkpoint": "none"}, data={"prompt_data": "none"}, second_policy=table)
    nobody = cast(Any, None)
    samples = of(play(match, PROMPTS[:1])[0])
    first, second = (Policy(config, nobody, nobody, nobody, name=name) for name in config.policies)
    for _ in range(2):
        assert first.own(samples) == samples
        assert second.own(samples) == []
    assert second.own([]) == []
    (warning,) = capsys.readouterr().err.splitlines()
    assert "the policy 'second_policy' plays no role of these samples ('first', " in warning
