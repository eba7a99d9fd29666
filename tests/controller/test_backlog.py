"""Which prompts a step begins, and what becomes of those that it does not train on."""

from __future__ import annotations

import random
from typing import Any, cast

import msgspec
import pytest

from miles_spmd.config import Config
from miles_spmd.controller.datasets import position_of
from miles_spmd.controller.generation.backlog import Supply
from miles_spmd.types.sample import Prompt

ACCEPTS, SUBMITS = 4, 6


class Data:
    def prompts(self, step: int, count: int) -> list[Prompt]:
        return [Prompt(f"data:{step * count + i}", "", [1]) for i in range(count)]

    def at(self, position: int) -> Prompt:
        return Prompt(f"data:{position}@{position}", "", [1])


def supply(**rollout: Any) -> Supply:
    settings = {"rollout_batch_size": ACCEPTS, "over_sampling_batch_size": SUBMITS} | rollout
    config = Config(model={"hf_checkpoint": "none"}, data={"prompt_data": "none"}, rollout=settings)
    return Supply(config, cast(Any, Data()))


def test_over_sampling_alone_is_a_function_of_the_step() -> None:
    one = supply()
    assert [prompt.uid for prompt in one.first(2)] == [f"data:{i}" for i in range(12, 18)]
    one.end([])
    assert (one.keeps, one.room, one.continued()) == (False, 0, [])


@pytest.mark.parametrize("seed", range(3))
def test_partial_rollouts_train_on_every_prompt_once(seed: int) -> None:
    one, generator, trained = supply(partial_rollout=True), random.Random(seed), list[int]()
    for step in range(20):
        begun = [*one.continued(), *((prompt, step) for prompt in one.first(step))]
        assert len(begun) == SUBMITS
        assert all(since <= step for _, since in begun)
        saved = msgspec.msgpack.encode(one.backlog)  # a step that is repeated begins with the same prompts
        assert [*one.continued(), *((prompt, step) for prompt in one.first(step))] == begun
        accepted = set(generator.sample(range(SUBMITS), ACCEPTS))
        trained += [position_of(begun[number][0].uid) for number in accepted]
        one.end([pair for number, pair in enumerate(begun) if number not in accepted][: one.room])
        assert msgspec.msgpack.encode(one.backlog) != saved
    waiting = [waiting.position for waiting in one.backlog.waiting]
    assert sorted(trained + waiting) == list(range(SUBMITS + 19 * ACCEPTS))


def test_long_ones_are_a_batch_of_their_own() -> None:
    """Prompt 5 of every six never finishes in time."""
    one, of_steps = supply(acceptance="balanced"), list[list[int]]()
    for step in range(7):
        begun, is_long = one.first(step), one.is_long
        places = [position_of(prompt.uid) for prompt in begun]
        of_steps.append(places)
        late = [] if is_long else [(begun[number], step) for number in (1, 5)]
        one.end(late)
    assert of_steps[:2] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert of_steps[2] == [1, 5, 7, 11]
    assert of_steps[3:5] == [[12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23]]
    assert of_steps[5] == [13, 17, 19, 23]
