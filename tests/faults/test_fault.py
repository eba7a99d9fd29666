"""What a list of faults means, and every error that it can have, for a configuration whose phases are known."""

from __future__ import annotations

from typing import Any

import pytest

from miles_spmd.config import Config
from miles_spmd.faults.fault import KINDS, Fault, read_faults, steps_by_phase

RANKS = 4


def config(**changes: dict[str, Any]) -> Config:
    tables: dict[str, Any] = {
        "model": {"hf_checkpoint": "none"},
        "data": {"prompt_data": "none"},
        "run": {"num_rollout": 10},
        "checkpoint": {"save_interval": 3, "save_final": True},
        "eval": {"eval_prompt_data": {"held": "none"}, "eval_interval": 4},
        "reward": {"rm_type": "math"},
    }
    for table, settings in changes.items():
        tables[table] = tables.get(table, {}) | settings
    return Config(**tables)


def errors(text: str, *without: str, **changes: dict[str, Any]) -> list[str]:
    _, found = read_faults(text, config(**changes), RANKS, without)
    assert all(error.startswith("--faults: ") for error in found)
    return [error.removeprefix("--faults: ") for error in found]


def test_faults_are_read_with_the_defaults_of_their_kinds() -> None:
    text = "kill:rank1@train.3, kill@train.4,term@rollout.2,stop@refit.1,slow@log_probs.0,lost@eval.4,diskfull@save.3,"
    found, problems = read_faults(text + "corrupt@save.6,kill:controller@start", config(), RANKS)
    assert problems == []
    assert found == [
        Fault("kill", "rank1", "train", 3),
        Fault("kill", "rank3", "train", 4),
        Fault("term", "launcher", "rollout", 2),
        Fault("stop", "rank3", "refit", 1),
        Fault("slow", "rank3", "log_probs", 0),
        Fault("lost", "rank3", "eval", 4),
        Fault("diskfull", "", "save", 3),
        Fault("corrupt", "", "save", 6),
        Fault("kill", "controller", "start"),
    ]
    assert [str(fault) for fault in found][::4] == [
        "kill:rank1@train.3",
        "slow:rank3@log_probs.0",
        "kill:controller@start",
    ]
    assert {fault.kind for fault in found} == {*KINDS}


def test_phases_come_in_their_steps() -> None:
    def steps(**changes: dict[str, Any]) -> dict[str, list[int]]:
        return {phase: sorted(found) for phase, found in steps_by_phase(config(**changes)).items()}

    of_ten = [*range(10)]
    rl = {"rollout": of_ten, "log_probs": of_ten, "train": of_ten, "refit": [*range(11)]}
    assert steps() == rl | {"eval": [0, 4, 8, 10], "save": [3, 6, 9, 10]}
    assert steps(refit={"update_weights_interval": 5})["refit"] == [0, 4, 5, 8, 10]
    assert steps(checkpoint={"save_interval": 5, "save_final": False})["save"] == [5, 10]
    no_eval = {"eval_interval": 0}
    sft = {"rollout": [], "log_probs": [], "train": of_ten, "refit": [], "eval": [], "save": [3, 6, 9, 10]}
    assert steps(run={"mode": "sft"}, eval=no_eval) == sft
    assert steps(run={"mode": "sft"})["refit"] == [0, 4, 8, 10]  # an evaluation generates
    assert steps(run={"mode": "dpo"}) == sft | {"log_probs": of_ten, "eval": [0, 4, 8, 10]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names none; write for example --faults kill:rank0@train.1,term@rollout.2"),
        ("kill", "kill: is not KIND[:PROCESS]@PHASE.STEP, such as kill:rank1@train.3 or term@start"),
        ("kil@train.3", "kil@train.3: unknown kind 'kil'; did you mean kill"),
        ("explode@train.3", "explode@train.3: unknown kind 'explode'; there are " + ", ".join(KINDS)),
        ("kill@trian.3", "kill@trian.3: unknown phase 'trian'; did you mean train"),
        ("kill@train", "kill@train: a phase of a step has its number: write @train.STEP, such as @train.1"),
        ("kill@train.x", "kill@train.x: a phase of a step has its number: write @train.STEP, such as @train.1"),
        ("kill@train." + "9" * 5000, "kill@train." + "9" * 5000 + ": a phase of a step has its number: write "
         "@train.STEP, such as @train.1"),
        ("kill:rank" + "9" * 5000 + "@train.1", "kill:rank" + "9" * 5000 + "@train.1: unknown process 'rank"
         + "9" * 5000 + "'; there are rankN, controller, launcher, reward"),
        ("kill:@train.1", "kill:@train.1: unknown process ''; there are rankN, controller, launcher, reward"),
        ("kill@start.1", "kill@start.1: a start has no step: write @start; it is the first one after the faults listed "
         "before it"),
        ("kill:rank4@train.1", "kill:rank4@train.1: the run has rank0 to rank3: raise --nproc-per-node, "
         "or name another"),
        ("kill:driver@train.1", "kill:driver@train.1: unknown process 'driver'; there are rankN, controller, launcher, "
         "reward"),
        ("slow:launcher@train.1", "slow:launcher@train.1: slow cannot strike launcher; it can strike rankN"),
        ("stop:launcher@train.1", "stop:launcher@train.1: stop cannot strike launcher; it can strike rankN, "
         "controller, reward"),
        ("corrupt:rank0@save.6", "corrupt:rank0@save.6: corrupt has no process: write corrupt@PHASE.STEP"),
        ("corrupt@train.6", "corrupt@train.6: corrupt cannot strike in the phase train; it can in save"),
        ("lost@start", "lost@start: lost cannot strike in the phase start; it can in refit, eval, save, rollout, "
         "log_probs, train"),
        ("kill@train.10", "kill@train.10: the last train is train.9, with run.num_rollout = 10"),
        ("kill@save.7", "kill@save.7: step 7 has no save; the nearest is save.6"),
        ("corrupt@save.3", "corrupt@save.3: no checkpoint is before it, so the run could not continue; the first with "
         "one is save.6"),
        ("kill:reward@train.1", "kill:reward@train.1: rewards are computed in rollout and eval, not in train"),
        ("kill@train.1,term@train.1", "kill:rank3@train.1 and term:launcher@train.1 would strike at the same moment; "
         "give each a step or a phase of its own"),
        ("slow@train.1,kill@start", "kill:rank3@start is listed after slow:rank3@train.1, which does not end the run, "
         "so no start comes after it; list kill:rank3@start before it, or after a fault that ends the run"),
    ],
)  # fmt: skip
def test_an_error_names_the_fault_and_the_remedy(text: str, problem: str) -> None:
    assert errors(text) == [problem]


def test_a_fault_that_cannot_strike_names_the_setting() -> None:
    never = {"save_interval": 0, "save_final": False}
    assert errors("kill@save.3", checkpoint=never) == [
        "kill@save.3: this run has no save: checkpoint.save_interval would give it one"
    ]
    assert errors("kill@rollout.3", run={"mode": "sft"}) == [
        "kill@rollout.3: this run has no rollout: run.mode would give it one"
    ]
    assert errors("corrupt@save.6", checkpoint={"keep_last": 1}) == [
        "corrupt@save.6: checkpoint.keep_last = 1 leaves no checkpoint before it; keep 2 or more"
    ]
    assert errors("kill:reward@rollout.1", reward={"rm_type": "exact"}) == [
        "kill:reward@rollout.1: reward.rm_type = 'exact' has no process of its own: the controller computes it"
    ]


def test_all_errors_are_reported_at_once() -> None:
    assert len(errors("kil@trian.3:,kill:rank9@train.1,kill@train.99,kill@train.1,stop@train.1")) == 5


def test_nothing_is_concluded_from_a_setting_that_is_wrong_itself() -> None:
    assert errors("kill@train.99", "run.num_rollout") == []
    assert len(errors("kil@train.99", "run.num_rollout")) == 1


def test_a_start_comes_after_the_faults_before_it() -> None:
    assert errors("kill@start,slow@train.1,kill@train.2") == []
    assert errors("slow@train.1,kill@train.2,kill@start,kill@start") == []
    assert errors("kill@train.2,slow@train.1,kill@start") == []  # the kill comes last, whatever the list's order
