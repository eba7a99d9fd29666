"""Which siblings of a rollout are trained: masks, and the denominators that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from miles_spmd.controller.generation.leaves import chosen
from miles_spmd.controller.learning.batch import set_loss_weights, to_sequences
from miles_spmd.plugins.environment import Context, Leaf
from miles_spmd.plugins.plug_point import PlugInError
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.trajectory import Segment, Trajectory
from tests.controller.test_episodes import PROMPTS, of, play


async def tree(context: Context, prompt: Prompt, only: int | None = None) -> Any:
    """A trunk of one turn with two branches, of which the longer one is asked for first, and a helper between them."""
    trunk = context.begin(prompt.tokens)
    await context.complete(trunk, max_new_tokens=4)
    trunk.append(Segment([91], sampled=False))
    short = context.fork(trunk)
    await context.complete(trunk)
    trunk.append(Segment([92], sampled=False))
    await context.complete(trunk)
    helper = context.begin([1, 2])
    await context.complete(helper)
    await context.complete(short)
    trunk.reward = 0.5
    leaves = [short, helper, trunk]
    leaves[0].reward = 0.5
    return leaves if only is None else leaves[only]


def of_rollouts(samples: Sequence[Sample]) -> list[list[Sample]]:
    return [[one for one in samples if one.rollout == name] for name in dict.fromkeys(one.rollout for one in samples)]


def trained(line: Trajectory) -> list[bool]:
    return [segment.trained for segment in line.segments if segment.sampled]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all", [[True, True], [True], [False, True, True]]),  # the trunk is trained in the first that has it
        ("longest", [[False, False], [False], [True, True, True]]),
        ("last", [[True, True], [False], [False, False, False]]),
        (f"{__name__}:helpers", [[False, False], [True], [False, False, False]]),
        (f"{__name__}:branches", [[True, True], [False], [False, True, True]]),
    ],
)
def test_what_is_trained(name: str, expected: list[list[bool]]) -> None:
    done, _, _ = play(tree, PROMPTS[:2], trained_leaves=name)
    untouched, _, _ = play(tree, PROMPTS[:2])
    for rollout, whole in zip(of_rollouts(of(done)), of_rollouts(of(untouched)), strict=True):
        assert [trained(one.trajectory) for one in rollout] == expected
        assert [one.sequence for one in rollout] == [one.sequence for one in whole]
        assert [one.rollout_log_probs for one in rollout] == [one.rollout_log_probs for one in whole]
        assert [one.reward for one in rollout] == [one.reward for one in whole]


@pytest.mark.parametrize("aggregation", ["rollout_mean", "token_mean", "constant"])
@pytest.mark.parametrize(("name", "only"), [("longest", 2), ("last", 0), (f"{__name__}:helpers", 1)])
def test_denominators_are_those_of_the_chosen_leaf_alone(aggregation: str, name: str, only: int) -> None:
    async def alone(context: Context, prompt: Prompt) -> Any:
        return await tree(context, prompt, only)

    done, _, _ = play(tree, PROMPTS, trained_leaves=name)
    expected, _, _ = play(alone, PROMPTS)
    weights = [of_samples(of(rollout), aggregation) for rollout in (done, expected)]
    assert [w.tolist() for w in weights[0][only::3]] == [w.tolist() for w in weights[1]]
    others = [w for place, w in enumerate(weights[0]) if place % 3 != only]
    assert len(others) == 2 * 2 * len(PROMPTS)
    assert not any(w.any() for w in others)
    assert sum(w.sum() for w in weights[0]) > 0


def of_samples(samples: Sequence[Sample], aggregation: str) -> list[np.ndarray]:
    """The loss weights of one optimizer step on all of them."""
    sequences, names = to_sequences(samples), [one.rollout for one in samples]
    set_loss_weights(sequences, aggregation, 40, np.asarray([names.index(name) for name in names]))
    return [sequence.loss_weights for sequence in sequences]


def test_roles_choose_apart_and_a_rollout_of_one_leaf_is_trained() -> None:
    async def duel(context: Context, prompt: Prompt) -> Any:
        players = [context.begin(prompt.tokens, role=role) for role in ("A", "B", "B")]
        for player in players:
            await context.complete(player)
        players[0].reward = players[1].reward = 1.0
        return players

    done, _, _ = play(duel, PROMPTS[:1], trained_leaves="last")
    assert [trained(one.trajectory) for one in of(done)] == [[True], [False], [True]] * 2


def test_evaluations_call_nothing() -> None:
    """A function that would end the run is not asked."""
    done, _, _ = play(tree, PROMPTS[:1], trained_leaves=f"{__name__}:nothing", purpose="evaluation of x")
    assert len(of(done)) == 6
    with pytest.raises(PlugInError, match=r"returned \[\]; it must return at least one of the numbers from 0 to 2"):
        play(tree, PROMPTS[:1], trained_leaves=f"{__name__}:nothing")


@pytest.mark.parametrize("name", ["twice", "beyond", "text", "mask", "halves", "raises"])
def test_what_cannot_be_used(name: str) -> None:
    leaves = [Leaf(Trajectory([1]), order) for order in range(2)]
    with pytest.raises(PlugInError, match=rf"environment.trained_leaves = 'tests\.controller\.test_leaves:{name}'"):
        chosen(f"{__name__}:{name}", leaves)


def helpers(leaves: Sequence[Leaf]) -> Sequence[int]:
    return [number for number, leaf in enumerate(leaves) if leaf.trajectory.start == [1, 2]]


def branches(leaves: Sequence[Leaf]) -> Sequence[int]:
    return [number for number, leaf in enumerate(leaves) if leaf.trajectory.turns > 1]


def nothing(leaves: Sequence[Leaf]) -> Sequence[int]:
    return []


def twice(leaves: Sequence[Leaf]) -> Sequence[int]:
    return [1, 1]


def beyond(leaves: Sequence[Leaf]) -> Sequence[int]:
    return [2]


def text(leaves: Sequence[Leaf]) -> Any:
    return "first"


def mask(leaves: Sequence[Leaf]) -> Any:
    return [True, False]


def halves(leaves: Sequence[Leaf]) -> Any:
    return [0.5]


def raises(leaves: Sequence[Leaf]) -> Sequence[int]:
    raise KeyError("no such leaf")
