"""Whole runs in which one policy plays both roles of a game, or two policies one each."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from miles_spmd.controller.checkpoint_folders import read
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.telemetry.trackers import read_metrics
from tests.controller.duel import ROLES, SELF_PLAY, TWO
from tests.ledger.runs import Recipe, train
from tests.ranks import Ranks


def test_a_run_with_moving_averages_is_repeated_and_resumed_exactly(
    ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = Recipe(tmp_path_factory.mktemp("duel"))
    whole, again = (train(ranks, recipe.config(name, *SELF_PLAY)) for name in ("whole", "again"))
    found = compare(verify(whole), verify(again))
    assert found.equal, found.difference
    baselines = read(whole / "checkpoints" / "step_000002").baselines
    assert set(baselines[""]) == set(ROLES)  # type: ignore[index]
    assert 0 < abs(baselines[""]["first"]) < 1  # type: ignore[index]

    resumed = Path(shutil.copytree(whole, whole.with_name("resumed"), symlinks=True))
    shutil.rmtree(resumed / "checkpoints" / "step_000004")
    train(ranks, recipe.config("resumed", *SELF_PLAY, "checkpoint.resume=true"))
    assert verify(resumed).steps == verify(whole).steps
    last = [read(run / "checkpoints" / "step_000004").baselines for run in (whole, resumed)]
    assert last[0] == last[1] != baselines


def updates_of(folder: Path, model: str) -> list[tuple[bytes, bytes, bytes]]:
    """The digests of what a model was trained on, and of what came of it, in every update of a run."""
    updates = [update for step in verify(folder).steps.values() for update in step.updates if update.role == model]
    return [(update.inputs, update.advantages, update.weights) for update in updates]


def test_which_policy_plays_a_role_changes_no_bit_of_it(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both begin with one checkpoint: the policy of a role comes to the same, whether it is the first or the second,
    and whether the first one has engines on ranks of their own."""
    recipe = Recipe(tmp_path_factory.mktemp("exchanged"))
    of_first = ['second_policy.second_roles=["second"]', "megatron.lr=1e-3", "second_policy.second_lr=2e-3"]
    of_second = ['second_policy.second_roles=["first"]', "megatron.lr=2e-3", "second_policy.second_lr=1e-3"]
    one = train(ranks, recipe.config("one", *TWO, *of_first, "run.num_rollout=2"), 2)
    other = train(ranks, recipe.config("other", *TWO, *of_second, "run.num_rollout=2"), 2)
    models = ("actor", "second_policy/actor")
    assert len(updates_of(one, models[0])) == 4
    for model, exchanged in zip(models, reversed(models)):
        assert updates_of(one, model) == updates_of(other, exchanged)
    assert updates_of(one, models[0]) != updates_of(one, models[1])
    apart = train(ranks, recipe.config("apart", *TWO, *of_first, "run.num_rollout=2", "rollout_num_gpus=1"), 3)
    found = compare(verify(one), verify(apart))
    assert found.equal, found.difference


def test_two_policies_are_trained_on_each_others_games(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each by ranks of its own, on the samples of its roles alone; the run is repeated and resumed exactly."""
    recipe = Recipe(tmp_path_factory.mktemp("two"))
    settings = [*TWO, 'second_policy.second_roles=["second"]', "second_policy.second_lr=2e-3"]
    whole, again = (train(ranks, recipe.config(name, *settings), 2) for name in ("whole", "again"))
    found = compare(verify(whole), verify(again))
    assert found.equal, found.difference
    record, samples = verify(whole), 0
    models = ["actor", "second_policy/actor"]
    for number, step in record.steps.items():
        assert [update.role for update in step.updates] == [models[0]] * 2 + [models[1]] * 2
        data = step_data.read(whole, number)
        assert data is not None
        assert data.samples is not None
        samples += len(data.samples.uids)
        assert Counter(data.samples.roles) == {"first": 12, "second": 12}
        tokens = [
            start.tolist() + own.tolist()
            for start, own in zip(*(r.split() for r in (data.samples.prompts, data.samples.responses)))
        ]
        for role, updates in ((ROLES[0], data.updates[:2]), (ROLES[1], data.updates[2:])):
            trained = [own.tolist() for update in updates for own in update.fields["tokens"].split()]
            assert trained == [own for own, name in zip(tokens, data.samples.roles) if name == role]
    (context,) = record.contexts
    assert context.weights[models[0]] == context.weights[models[1]]  # both begin with one checkpoint
    last = record.saved[4]
    assert last.weights[models[0]] != last.weights[models[1]]
    assert set(last.optimizers) == set(models)
    metrics = read_metrics(whole / "metrics.jsonl")[4]
    assert (metrics["train/lr"], metrics["second_policy/train/lr"]) == (1e-3, 2e-3)

    resumed = Path(shutil.copytree(whole, whole.with_name("resumed"), symlinks=True))
    shutil.rmtree(resumed / "checkpoints" / "step_000004")
    train(ranks, recipe.config("resumed", *settings, "checkpoint.resume=true"), 2)
    assert (verify(resumed).steps, verify(resumed).saved) == (record.steps, record.saved)
    baselines = [read(run / "checkpoints" / "step_000004").baselines for run in (whole, resumed)]
    assert baselines[0] == baselines[1]
    assert set(baselines[0][""]) == set(ROLES)  # type: ignore[index]
