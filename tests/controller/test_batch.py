"""From a rollout to optimizer steps: siblings, groups that teach nothing, samples without a trained token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miles_spmd.config import Config
from miles_spmd.controller.learning.batch import optimizer_steps, to_sequences
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.train_sequence import TrainSequence
from miles_spmd.types.trajectory import Segment, Trajectory
from tests.samples import sample_of


def config(size: int | None = None, **algorithm: Any) -> Config:
    return Config(
        model={"hf_checkpoint": "none"},
        data={"prompt_data": "none"},
        algorithm=algorithm,
        train={"global_batch_size": size},
    )


def sample(prompt: str, index: int, length: int, reward: float | None, trained: int | None = None) -> Sample:
    mask = [1] * length if trained is None else [1] * trained + [0] * (length - trained)
    return sample_of(Prompt(prompt, prompt, [1, 2]), index, list(range(length)), [-1.0] * length, mask, reward=reward)


def steps_of(samples: list[Sample], run: Config) -> tuple[list[list[TrainSequence]], dict[str, float]]:
    return optimizer_steps(samples, to_sequences(samples), {}, run)[:2]


def test_siblings_are_one_rollout() -> None:
    """Two turns of one conversation against the same tokens in one sample: same advantages, same weight per token."""
    turns = [sample("a", 0, 3, 1.0), sample("a", 0, 5, 1.0), sample("a", 1, 4, 0.0), sample("a", 2, 2, 0.0)]
    whole = [sample("a", 0, 8, 1.0), *turns[2:]]
    (parted,), _ = steps_of(turns, config())
    (joined,), _ = steps_of(whole, config())
    for ours, theirs in ((parted[0], joined[0]), (parted[1], joined[0]), (parted[2], joined[1])):
        for name in ("advantages", "loss_weights"):
            assert getattr(ours, name)[-1] == pytest.approx(getattr(theirs, name)[-1])
    assert sum(s.loss_weights.sum() for s in parted) == pytest.approx(1.0)


def conversation(rewards: list[float | None], lengths: list[int], reward: float, start: int = 2) -> Sample:
    """Turns of so many tokens each, with three tokens of others between them."""
    segments: list[Segment] = []
    for of_turn, length in zip(rewards, lengths, strict=True):
        segments += [Segment([5] * 3, sampled=False)] if segments else []
        segments.append(Segment([6] * length, log_probs=[-1.0] * length, reward=of_turn))
    return Sample(Prompt("a", "a", [1] * start), 0, Trajectory([1] * start, segments), reward)


@pytest.mark.parametrize("name", ["ppo", "reinforce_plus_plus"])
def test_rewards_of_turns_come_at_their_ends(name: str) -> None:
    """Against the definitions of return and of generalised advantage in float64, as double loops over transitions."""
    generator, gamma, lambd = np.random.default_rng(0), 0.97, 0.9 if name == "ppo" else 1.0
    for _ in range(20):
        lengths = generator.integers(1, 5, size=generator.integers(1, 6)).tolist()
        given = [None if generator.random() < 0.3 else float(generator.normal()) for _ in lengths]
        one = conversation(given, lengths, float(generator.normal()))
        (sequence,) = to_sequences([one])
        trained = np.flatnonzero(sequence.loss_weights).tolist()
        values = generator.normal(size=len(sequence.tokens)) if name == "ppo" else np.zeros(len(sequence.tokens))
        run = config(advantage_estimator=name, gamma=gamma, lambd=0.9, kl_coef=0.0, normalize_advantages=False)
        steps, *_ = optimizer_steps([one], [sequence], {"values": [values]} if name == "ppo" else {}, run)

        received = dict.fromkeys(trained, 0.0)
        for end, of_turn in zip(np.cumsum(lengths), given):
            received[trained[end - 1]] += of_turn or 0.0
        received[trained[-1]] += (one.reward or 0.0) - sum(of_turn or 0.0 for of_turn in given)
        delta = [
            received[t] + (gamma * values[after] if after is not None else 0.0) - values[t]
            for t, after in zip(trained, [*trained[1:], None])
        ]
        expected = [
            sum((gamma * lambd) ** (j - k) * delta[j] for j in range(k, len(trained))) for k in range(len(trained))
        ]
        assert steps[0][0].advantages[trained] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_groups_compare_whole_rewards() -> None:
    """What turns have received of them makes no difference."""
    advantages = []
    for first in (None, 0.25):
        samples = [conversation([first, None], [2, 2], reward) for reward in (1.0, 0.0)]
        samples[1].index = 1
        (step,), _ = steps_of(samples, config())
        advantages.append([s.advantages.tolist() for s in step])
    assert advantages[0] == advantages[1]
    assert advantages[0][0][2] > 0


def test_siblings_stay_in_one_step() -> None:
    samples = [
        sample(prompt, index, 2, float(index)) for prompt in "ab" for index in range(2) for _ in range(1 + index)
    ]
    steps, _ = steps_of(samples, config(size=2))  # two rollouts, of one and of two samples
    assert [len(step) for step in steps] == [3, 3]
    for step in steps:
        assert sum(s.loss_weights.sum() for s in step) == pytest.approx(1.0)


def test_a_remainder_is_a_smaller_step() -> None:
    steps, _ = steps_of([sample("a", i, 2, float(i)) for i in range(5)], config(size=2))
    assert [len(step) for step in steps] == [2, 2, 1]


def test_groups_without_variance_teach_nothing_and_are_counted() -> None:
    samples = [sample(prompt, i, 3, float(i) if prompt == "b" else 0.1) for prompt in "abc" for i in range(4)]
    (step,), metrics = steps_of(samples, config())
    advantages = [s.advantages for s in step]
    assert metrics["rollout/zero_std_groups"] == 2
    assert all(not a.any() for a in [*advantages[:4], *advantages[8:]])
    assert all(a[2:].any() for a in advantages[4:8])


def test_samples_without_a_trained_token_are_counted() -> None:
    samples = [sample("a", i, 3, float(i), trained=0 if i else None) for i in range(4)]
    (step,), metrics = steps_of(samples, config())
    assert metrics["rollout/fully_masked_samples"] == 3
    assert [s.loss_weights.sum() for s in step] == pytest.approx([0.25, 0, 0, 0])  # they count in the mean
    assert np.isfinite(np.concatenate([s.advantages for s in step])).all()


@pytest.mark.parametrize("reward", [None, np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_named(reward: float | None) -> None:
    samples = [sample("a", 0, 3, 1.0), sample("a", 1, 3, reward)]
    with pytest.raises(ValueError, match=r"rewards of samples \[1\] are not finite"):
        steps_of(samples, config())
