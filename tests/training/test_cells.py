"""Cells that train together: bitwise what one world of ranks computes, whichever of them dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from miles_spmd.config import Config
from miles_spmd.protocol.results import MeetResult
from miles_spmd.training.roles import Roles
from miles_spmd.types.role import Role
from miles_spmd.types.train_sequence import TrainSequence
from tests.ranks import Ranks
from tests.training.cases import PP2, TP2, ZERO, config, sequences
from tests.training.cells import (
    Cells,
    Digests,
    cells,
    compute,
    damage_what_it_sends,
    die,
    digests,
    keeps,
    meet,
    own_leaves,
    update,
)

LEAVES = 4
UPDATES = 4
PLANNED = 40
LIMITS = {"exchange_timeout": 20.0}
ADAM = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0}
TRAIN = {"reduction_leaves": LEAVES, "lr_warmup_iters": 2, "lr_decay_style": "cosine"}
BATCHES = [sequences([11, 7, 29, 5, 16, 23, 8, 13], seed) for seed in range(UPDATES)]


def settings(megatron: dict[str, Any], name: str = "qwen3", **model: Any) -> Config:
    return config(name, ADAM | megatron, run={"num_rollout": PLANNED}, train=TRAIN, model=model, resilience=LIMITS)


def in_one_world(run: Config, updates: int) -> list[tuple[tuple[int, int, int], float, Digests]]:
    roles, steps = Roles(run), []
    trainer = roles.actor
    place = trainer.where.pp_rank, trainer.where.tp_rank, trainer.where.dp_rank
    for number in range(updates):
        micro_batches = own_leaves(BATCHES[number], trainer, LEAVES, 0, LEAVES)
        steps.append((place, trainer.train_step(micro_batches).grad_norm, digests(roles)))
    return steps


def alone(ranks: Ranks, run: Config, world_size: int, updates: int) -> list[list[tuple[float, Digests]]]:
    """Return norm and digests of every update, of the ranks of the first data-parallel replica."""
    first = [of_rank for of_rank in ranks.run(world_size, in_one_world, run, updates) if of_rank[0][0][2] == 0]
    return [[(norm, found) for _, norm, found in steps] for steps in zip(*first)]


def step(running: Cells, number: int, own: dict[int, list[int]]) -> dict[int, list[Any]]:
    """Let each cell make this update with its parts."""
    return running.call({cell: (update, (number, BATCHES[number], parts, LEAVES)) for cell, parts in own.items()})


def made(answers: dict[int, list[Any]], number: int, expected: list[tuple[float, Digests]]) -> None:
    """Every cell has made this update, and it is that of one world."""
    for cell, of_ranks in answers.items():
        for answer, (norm, found) in zip(of_ranks, expected, strict=True):
            assert answer[:2] == ("made", number), (cell, answer)
            assert (answer[2], answer[3]) == (norm, found), f"cell {cell}"


def rejoin(running: Cells, cell: int, number: int, expected: list[list[tuple[float, Digests]]]) -> None:
    """A cell that is behind meets the other one, which has made the updates before this one, and makes it with it."""
    for met in running.join(cell):
        assert (met.updates, met.problem) == (number, "")
        assert met.received > 0
    made(step(running, number, {1 - cell: [cell], cell: [1 - cell]}), number, expected[number])


@pytest.mark.parametrize(
    ("parts", "size", "megatron", "model"),
    [
        (2, 1, {}, {}),
        pytest.param(4, 1, {}, {}, marks=pytest.mark.slow),
        pytest.param(2, 2, TP2 | {"sequence_parallel": True}, {}, marks=pytest.mark.slow),
        pytest.param(2, 2, PP2, {}, marks=pytest.mark.slow),
        pytest.param(2, 1, {}, {"dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=["two", "four", "TP2+SP", "PP2", "bf16"],
)
def test_cells_compute_what_one_world_does(
    ranks: Ranks, tmp_path: Path, parts: int, size: int, megatron: dict[str, Any], model: dict[str, Any]
) -> None:
    run = settings(megatron, **model)
    expected = alone(ranks, run, parts * size, UPDATES)
    with cells(run, parts, size, tmp_path) as running:
        for number in range(UPDATES):
            made(step(running, number, {cell: [cell] for cell in range(parts)}), number, expected[number])


@pytest.mark.slow
def test_data_parallel_ranks_in_a_cell(ranks: Ranks, tmp_path: Path) -> None:
    """They divide the optimizer's state otherwise than one world of twice as many: its weights are the same."""
    run = settings(ZERO)
    expected = alone(ranks, run, 4, UPDATES)
    with cells(run, 2, 2, tmp_path) as running:
        for number in range(UPDATES):
            for of_ranks in step(running, number, {0: [0], 1: [1]}).values():
                for answer in of_ranks:
                    ((norm, found),) = expected[number]
                    assert answer[:3] == ("made", number, norm)
                    assert {n: d for n, d in answer[3].items() if not n.startswith("state.")} == {
                        n: d for n, d in found.items() if not n.startswith("state.")
                    }


def test_who_computes_what_does_not_matter(ranks: Ranks, tmp_path: Path) -> None:
    run = settings({})
    expected = alone(ranks, run, 4, UPDATES)
    with cells(run, 4, 1, tmp_path) as running:
        for number, own in enumerate(
            [
                {0: [3], 1: [2], 2: [1], 3: [0]},
                {0: [0, 1, 2, 3], 1: [], 2: [], 3: []},
                {0: [0], 1: [0, 1], 2: [1, 2], 3: [3]},  # two of them twice
                {0: [], 1: [3, 0], 2: [2, 1], 3: []},
            ]
        ):
            made(step(running, number, own), number, expected[number])


def test_a_part_that_nobody_has(ranks: Ranks, tmp_path: Path) -> None:
    """Nothing is done, and the next attempt needs only that part. Then none is kept."""
    run = settings({})
    expected = alone(ranks, run, 2, 2)
    with cells(run, 2, 1, tmp_path) as running:
        answers = step(running, 0, {0: [0], 1: []})
        assert [answer for of_ranks in answers.values() for answer in of_ranks] == [
            ("lost", "no cell has part 1", [1])
        ] * 2
        assert running.call(dict.fromkeys((0, 1), (keeps, ()))) == {0: [[0]], 1: [[]]}
        made(step(running, 0, {0: [], 1: [1]}), 0, expected[0])
        assert running.call(dict.fromkeys((0, 1), (keeps, ()))) == {0: [[]], 1: [[]]}
        made(step(running, 1, {0: [1], 1: [0]}), 1, expected[1])


@pytest.mark.parametrize(
    ("moment", "size", "megatron"),
    [
        ("backward", 1, {}),
        ("exchange", 1, {}),
        *(pytest.param(moment, 1, {}, marks=pytest.mark.slow) for moment in ("agree", "vote", "commit")),
        *(
            pytest.param(moment, 2, TP2, marks=pytest.mark.slow)
            for moment in ("agree", "backward", "exchange", "vote", "commit")
        ),
    ],
)
def test_a_cell_dies(ranks: Ranks, tmp_path: Path, moment: str, size: int, megatron: dict[str, Any]) -> None:
    """The other one makes the same update, and computes for it what the dead one would have; a new cell receives its
    state, and has the next part."""
    run = settings(megatron)
    expected = alone(ranks, run, 2 * size, UPDATES)
    with cells(run, 2, size, tmp_path) as running:
        made(step(running, 0, {0: [0], 1: [1]}), 0, expected[0])
        running.call({1: (die, (moment,))})
        began = time.monotonic()
        answers = step(running, 1, {0: [0], 1: [1]})
        assert answers.keys() == {0}
        lost = [answer for answer in answers[0] if answer[0] == "lost"]
        if moment in ("vote", "commit"):  # everything was exchanged
            assert not lost
        while lost:
            assert time.monotonic() - began < 15
            answers = step(running, 1, {0: [0, 1]})
            lost = [answer for answer in answers[0] if answer[0] == "lost"]
        made(answers, 1, expected[1])
        running.start(1)
        running.ready(1)
        rejoin(running, 1, 2, expected)


@pytest.mark.slow
def test_a_cell_that_is_suspended_catches_up(ranks: Ranks, tmp_path: Path) -> None:
    run = settings({})
    expected = alone(ranks, run, 2, UPDATES)
    with cells(run, 2, 1, tmp_path) as running:
        made(step(running, 0, {0: [0], 1: [1]}), 0, expected[0])
        ((process, _),) = running.live[1].ranks
        running.call({1: (die, ("backward", signal.SIGSTOP))})
        running.begin(1, update, 1, BATCHES[1], [1], LEAVES)  # and stops in it
        answers = step(running, 1, {0: [0]})
        while answers[0][0][0] == "lost":
            answers = step(running, 1, {0: [0, 1]})
        made(answers, 1, expected[1])
        assert running.answers(1, 0) is None
        os.kill(process.pid, signal.SIGCONT)
        (late,) = running.met(1)  # it goes on to make the update
        assert late[0] == "lost"
        # what it has computed before it caught up is not used
        answers = step(running, 2, {0: [0], 1: []})
        assert [answer for of_ranks in answers.values() for answer in of_ranks] == [
            ("lost", "no cell has part 1", [1])
        ] * 2
        made(step(running, 2, {0: [0], 1: [1]}), 2, expected[2])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "megatron"), [(1, {}), (2, TP2)])
def test_a_state_that_arrives_damaged_is_not_used(
    ranks: Ranks, tmp_path: Path, size: int, megatron: dict[str, Any]
) -> None:
    """A cell that nobody else can heal does nothing with it, either."""
    run = settings(megatron)
    expected = alone(ranks, run, 2 * size, UPDATES)
    with cells(run, 2, size, tmp_path) as running:
        made(step(running, 0, {0: [0], 1: [1]}), 0, expected[0])
        running.lose(1)
        running.call({0: (damage_what_it_sends, ())})  # once
        running.start(1)
        running.ready(1)
        first, *others = running.join(1)
        assert "damaged" in first.problem
        assert all(met.problem and not met.updates for met in (first, *others))
        rejoin(running, 1, 1, expected)
        running.lose(0)
        running.call({1: (damage_what_it_sends, ())})
        running.start(0)
        running.ready(0)
        assert all(met.problem for met in running.join(0))
        running.lose(1)
        for met in running.call({0: (meet, (True,))})[0]:
            assert "no cell is there" in met.problem
        assert all(answer[0] == "lost" for answer in step(running, 2, {0: [0, 1]})[0])


# --- what a cell that joins has ---------------------------------------------------------------------------------------


def with_critic() -> Config:
    """Actor, critic, and a reference policy that is replaced meanwhile."""
    algorithm = {"advantage_estimator": "ppo", "kl_loss_coef": 0.1, "ref_update_interval": 1}
    return config(
        "qwen3",
        ADAM,
        algorithm=algorithm,
        run={"num_rollout": PLANNED},
        train=TRAIN | {"critic_lr": 3e-3},
        resilience=LIMITS,
    )


def valued(number: int) -> list[TrainSequence]:
    rng = np.random.default_rng(number)

    def one(sequence: TrainSequence) -> TrainSequence:
        returns, old = rng.normal(size=(2, len(sequence.tokens))).astype(np.float32)
        return msgspec.structs.replace(sequence, returns=returns, old_values=0.3 * old)

    return [one(sequence) for sequence in BATCHES[number]]


def both_in_one_world(run: Config) -> list[Digests]:
    """Update critic and actor, and replace the reference policy; twice."""
    roles, found = Roles(run), []
    for number in range(2):
        for role in (Role.CRITIC, Role.ACTOR):
            trainer = roles.trainer(role)
            trainer.train_step(own_leaves(valued(number), trainer, LEAVES, 0, LEAVES))
        roles.snapshot(Role.REF)
        found.append(digests(roles))
    return found


def replace_reference(roles: Roles) -> Digests:
    roles.snapshot(Role.REF)
    return digests(roles)


def test_all_trainers_and_the_reference_travel(ranks: Ranks, tmp_path: Path) -> None:
    run = with_critic()
    expected, _ = ranks.run(2, both_in_one_world, run)

    def step_of_both(number: int) -> None:
        for role in (Role.CRITIC, Role.ACTOR):
            work = {c: (update, (number, valued(number), [c], LEAVES, role)) for c in running.live}
            if 1 not in work:
                work[0] = (update, (number, valued(number), [0, 1], LEAVES, role))
            for of_ranks in running.call(work).values():
                assert of_ranks[0][0] == "made"
        for (found,) in running.call(dict.fromkeys(running.live, (replace_reference, ()))).values():
            assert found == expected[number]

    with cells(run, 2, 1, tmp_path) as running:
        running.lose(1)
        step_of_both(0)
        running.start(1)
        running.ready(1)
        (met,) = running.join(1)
        assert (met.updates, met.problem) == (2, "")
        assert running.call({1: (digests, ())}) == {1: [expected[0]]}
        step_of_both(1)


def load(roles: Roles, folder: str) -> str:
    return roles.load(folder, {}).problem


def saved(run: Config, folder: str) -> None:
    roles = Roles(run)
    roles.actor.train_step(own_leaves(BATCHES[0], roles.actor, LEAVES, 0, LEAVES))
    roles.save(folder)
    roles.save_progress(wait=True)


def test_what_was_loaded_travels_before_any_update(ranks: Ranks, tmp_path: Path) -> None:
    """So it does where cells have met before one more of them asks to."""
    run = settings({})
    expected = alone(ranks, run, 1, 2)
    ranks.run(1, saved, run, str(tmp_path / "saved"))
    with cells(run, 2, 1, tmp_path, founders=1) as running:
        assert running.call({0: (load, (str(tmp_path / "saved"),))}) == {0: [""]}
        running.start(1)
        running.ready(1)
        assert running.call({0: (meet, ())}) == {0: [MeetResult(0)]}
        running.begin(1, meet)
        assert running.answers(1, 1.0) is None  # it has missed that
        assert running.call({0: (meet, ())}) == {0: [MeetResult(0)]}
        (met,) = running.answers(1, 30.0) or []
        assert met.updates == 0
        assert met.received > 0
        assert not met.problem
        assert running.call({1: (digests, ())}) == {1: [expected[0][0][1]]}
        made(step(running, 1, {0: [1], 1: [0]}), 1, expected[1])


def test_cells_that_meet_for_different_purposes_do_nothing(ranks: Ranks, tmp_path: Path) -> None:
    """They learn it at once, and parts are kept."""
    run = settings({})
    expected = alone(ranks, run, 2, 1)
    with cells(run, 2, 1, tmp_path) as running:
        answers = running.call({0: (update, (0, BATCHES[0], [0], LEAVES)), 1: (meet, ())})
        assert "different purposes" in answers[0][0][1]
        assert "different purposes" in answers[1][0].problem
        made(step(running, 0, {0: [], 1: [1]}), 0, expected[0])


def test_a_cell_that_has_missed_the_beginning_does_nothing_alone(tmp_path: Path) -> None:
    with cells(settings({}), 2, 1, tmp_path, founders=1) as running:
        running.lose(0)
        running.start(1)
        running.ready(1)
        (met,) = running.call({1: (meet, ())})[1]
        assert "no cell is there" in met.problem
        ((lost, why, _),) = step(running, 0, {1: [0, 1]})[1]
        assert lost == "lost"
        assert "no cell is there" in why


def spoil(roles: Roles) -> None:
    """Let the gradient of the first part be infinite."""
    total = roles.in_cell.trainer(Role.ACTOR)._total
    total._gradient[0].view(-1)[0] = float("inf")


def make(roles: Roles, number: int) -> Any:
    result = roles.in_cell.make_update(Role.ACTOR, number)
    return result.skipped, digests(roles)


def test_all_skip_an_update_together(ranks: Ranks, tmp_path: Path) -> None:
    run = settings({})
    with cells(run, 2, 1, tmp_path) as running:
        before = running.call(dict.fromkeys((0, 1), (digests, ())))
        running.call({c: (compute, (0, BATCHES[0], [c], LEAVES, Role.ACTOR)) for c in (0, 1)})
        running.call({0: (spoil, ())})
        for cell, ((skipped, found),) in running.call(dict.fromkeys((0, 1), (make, (0,)))).items():
            assert skipped == "non-finite gradient"
            assert found == before[cell][0]
        answers = step(running, 0, {0: [0], 1: [1]})
        made(answers, 0, alone(ranks, run, 2, 1)[0])
