"""Runs that faults are injected into, which end with the ledger of a run that nothing disturbed."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from miles_spmd.chaos.rehearsal import OWN, Chaos, ChaosError, load
from miles_spmd.chaos.table import Row, render
from miles_spmd.config import Config
from miles_spmd.controller.run_folder import hold
from miles_spmd.faults.fault import OF_STEPS, read_faults
from miles_spmd.faults.strikes import VARIABLE
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests import forked
from tests.slurm.cluster import wait_for
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config

RANKS = 2
COIN = {"rm_type": "tests.recipe_run:coin", "reward_workers": 1, "reward_timeout": 5.0}  # in a process of its own
HANGS = ("stop", "lost")  # kinds that deadlines find
SHORT = {f"{name}_timeout": 15.0 for name in ("train", "rollout", "refit", "checkpoint")} | {"heartbeat_timeout": 5.0}


def start(folder: Path, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> forked.Program:
    """A start by a process that has imported everything."""
    variables = dict(environment) | {"PYTHONPATH": str(forked.REPOSITORY)}
    return forked.start(arguments, folder, variables, output, output)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def recipe(folder: Path, checkpoint: Path, steps: int, /, **changes: dict[str, Any]) -> Path:
    tables: dict[str, dict[str, Any]] = {
        "run": {"num_rollout": steps},
        "rollout": {"engine": REFERENCE_ENGINE},
        "eval": {"eval_prompt_data": {"held": str(folder / "data.jsonl")}, "eval_interval": 5},
        "checkpoint": {"save_interval": 1},
        "algorithm": {"kl_loss_coef": 0.001},  # for log-probs of the reference model
        "determinism": {"deterministic": True, "parity": "off"},
    }
    for table, settings in changes.items():
        tables[table] = tables.get(table, {}) | settings
    return write_config(folder, checkpoint, **tables)


def chaos(config: Path, faults: str, ranks: int = RANKS) -> tuple[Config, list[Row]]:
    """The configuration of the run that survived ``faults``, and what they did."""
    found, listed = load(config, ["run.name=tiny-chaos"], faults, ranks)
    command = ["-m", "miles_spmd", "train", str(config), "run.name=tiny-chaos", *OWN[:2], f"--nproc-per-node={ranks}"]
    lines = list[str]()
    run = Chaos(found, listed, command, start=partial(start, config.parent), show=lines.append)
    try:
        run.survive()
    finally:
        print("\n".join([*lines, render(run.rows())]))
    return found, run.rows()


def undisturbed(config: Path, timeout: float = 200) -> Path:
    folder, command = config.parent, ("-m", "miles_spmd", "train", config, f"--nproc-per-node={RANKS}")
    done = forked.run(*command, folder=folder, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def check_equal(a: Path, b: Path) -> None:
    found = compare(verify(a), verify(b))
    assert found.equal, found.difference


@pytest.mark.slow
def test_a_run_survives_a_chain_of_faults(tmp_path: Path, checkpoint: Path) -> None:
    config = recipe(tmp_path, checkpoint, 7)
    found, rows = chaos(
        config,
        "slow:rank1@train.1,kill:rank1@train.2,diskfull@save.3,corrupt@save.4,term@rollout.5,kill:controller@start",
    )
    check_equal(undisturbed(config), found.run_dir)
    said = {str(row.fault): row for row in rows}
    assert [*said] == [
        "slow:rank1@train.1",
        "kill:rank1@train.2",
        "diskfull@save.3",
        "corrupt@save.4",
        "term:launcher@rollout.5",
        "kill:controller@start",
    ]
    assert len(rows) == 6
    assert f"pid {said['kill:rank1@train.2'].strike.pids[0]}) died: train, step 2" in said["kill:rank1@train.2"].said
    warning = said["diskfull@save.3"].said
    assert "the checkpoint of step 3 could not be written: [Errno 27] File too large: " in warning
    assert said["diskfull@save.3"].exit is None
    assert "is damaged" in said["corrupt@save.4"].said
    assert said["corrupt@save.4"].said.endswith("; continuing from checkpoints/step_000002")
    assert said["corrupt@save.4"].steps >= 2


OF_CELLS: dict[str, Any] = {"resilience": {"cells": 2, "cell_restarts": 100}, "train": {"reduction_leaves": 4}}


@pytest.mark.parametrize(
    ("steps", "faults"),
    [
        pytest.param(60, ["kill:rank1@train.2", "kill:rank0@rollout.20", "kill:rank1@save.40"], marks=pytest.mark.slow),
        pytest.param(
            600,
            [f"kill:rank{n % 2}@{OF_STEPS[n % len(OF_STEPS)]}.{15 * n + 5}" for n in range(38)],
            marks=[pytest.mark.slow, pytest.mark.timeout(1500)],
        ),
    ],
    ids=["three", "many"],
)
def test_cells_that_die_do_not_end_the_run(tmp_path: Path, checkpoint: Path, steps: int, faults: list[str]) -> None:
    config = recipe(tmp_path, checkpoint, steps, checkpoint={"save_interval": 5, "keep_last": 2}, **OF_CELLS)
    found, rows = chaos(config, ",".join(faults), ranks=1)
    assert [str(row.fault) for row in rows] == faults
    for row in rows:
        assert row.exit is None
        assert "the run goes on without cell" in row.said
        assert row.detection is not None
        assert row.next_step is not None
        assert row.back is not None
    folder = found.run_dir.rename(tmp_path / "hurt")
    config = recipe(tmp_path, checkpoint, steps, checkpoint={"save_interval": 5}, train=OF_CELLS["train"])
    check_equal(undisturbed(config), folder)


def at_random(count: int) -> list[str]:
    """So many faults of random ranks in random phases, 15 steps apart: the cell that one has hit is back before the
    next."""
    rng = random.Random(0)
    kinds = "kill", "kill", "stop", "slow"
    return [
        f"{rng.choice(kinds)}:rank{rng.randrange(2)}@{rng.choice(OF_STEPS)}.{15 * number + 5}"
        for number in range(count)
    ]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_hundred_faults_in_one_run(tmp_path: Path, checkpoint: Path) -> None:
    faults, steps = at_random(105), 1600
    settings = {"checkpoint": {"save_interval": 5, "keep_last": 2}}
    found, rows = chaos(recipe(tmp_path, checkpoint, steps, **settings, **OF_CELLS), ",".join(faults), ranks=1)
    assert [str(row.fault) for row in rows] == faults
    for row in rows:
        assert row.exit is None
        assert row.next_step is not None
        if row.fault.kind != "slow":
            assert "the run goes on without cell" in row.said
            assert row.back is not None
    folder = found.run_dir.rename(tmp_path / "hurt")
    config = recipe(tmp_path, checkpoint, steps, **settings, train=OF_CELLS["train"])
    check_equal(undisturbed(config, timeout=1800), folder)


CHAINS = {  # every kind, in several phases, to every process that it can strike
    "kill": "kill:rank0@rollout.1,kill:launcher@log_probs.2,kill:controller@refit.3,kill:rank1@save.4,"
    "kill:rank1@eval.5,kill@start,kill:launcher@start,kill:reward@rollout.5,kill:controller@train.6",
    "term": "term@start,term@rollout.1,term:rank1@train.2,term:controller@save.3,term@eval.5,term:rank0@log_probs.6",
    "stop": "stop:rank1@train.1,stop:controller@rollout.2,stop:rank0@save.3,stop:reward@rollout.4,stop:rank0@eval.5",
    "slow": "slow:rank0@rollout.1,slow:rank1@train.2,slow:rank1@refit.3,slow:rank0@save.4,slow:rank0@eval.5",
    "lost": "lost:rank1@train.1,lost:rank0@rollout.2,lost:rank1@save.3,lost:rank0@refit.4,lost:rank1@eval.5",
    "diskfull": "diskfull@rollout.1,diskfull:rank1@save.2,diskfull@save.4,diskfull:controller@save.5,diskfull@eval.5,"
    "diskfull:rank0@train.6",
    "corrupt": "corrupt@save.2,corrupt@save.5,kill:rank0@rollout.5,corrupt@save.6",
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The run of 7 steps that nothing disturbs."""
    return undisturbed(recipe(tmp_path_factory.mktemp("calm"), checkpoint, 7, reward=COIN))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", CHAINS)
def test_every_kind_in_several_phases(tmp_path: Path, checkpoint: Path, calm: Path, kind: str) -> None:
    config = recipe(tmp_path, checkpoint, 7, reward=COIN, deadlines=SHORT if kind in HANGS else {})
    found, rows = chaos(config, CHAINS[kind])
    assert sorted(str(row.fault) for row in rows) == sorted(map(str, read_faults(CHAINS[kind], found, RANKS)[0]))
    check_equal(calm, found.run_dir)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_in_saves(tmp_path: Path, checkpoint: Path) -> None:
    """Each at another moment of its save, and of another process."""
    processes = "rank0", "rank1", "controller", "launcher"
    faults = ",".join(f"kill:{processes[n % 4]}@save.{n + 1}" for n in range(20))
    config = recipe(tmp_path, checkpoint, 21, reward=COIN)
    found, rows = chaos(config, faults)
    assert len(rows) == 20
    check_equal(undisturbed(config), found.run_dir)


def test_a_run_that_fails_without_a_fault_is_one_error(tmp_path: Path, checkpoint: Path) -> None:
    config = recipe(tmp_path, checkpoint, 3, reward={"rm_type": "tests.worker.rewards:raises"})
    with pytest.raises(
        ChaosError, match=r"^start 1 ended without a fault: miles-spmd: .*RewardError: .*/start-1\.log$"
    ):
        chaos(config, "slow@eval.0,kill@train.1")


def test_two_rehearsals_of_one_run_do_not_disturb_each_other(tmp_path: Path, checkpoint: Path) -> None:
    """The second one begins between two starts of the first, when no run holds the folder."""
    config, folder = recipe(tmp_path, checkpoint, 3), tmp_path / "runs" / "tiny-chaos" / "faults"
    with hold(folder) or nullcontext():
        done = forked.run("-m", "miles_spmd", "chaos", config, "--faults=kill@train.1", folder=tmp_path)
    assert done.returncode == 2
    assert f"another run is writing into {folder} (pid {os.getpid()} on " in done.stderr
    assert [path.name for path in folder.iterdir()] == ["lock"]


SIGNALS = [signal.SIGHUP, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGTERM))]


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interruption_leaves_no_process(tmp_path: Path, checkpoint: Path, number: signal.Signals) -> None:
    config, output = recipe(tmp_path, checkpoint, 3), [tmp_path / "out", tmp_path / "err"]
    command = "-m", "miles_spmd", "chaos", config, "--faults=kill@train.1"
    program = forked.start(command, tmp_path, os.environ | {"PYTHONPATH": str(forked.REPOSITORY)}, *output)
    wait_for((tmp_path / "runs" / "tiny-chaos" / "lock").exists, 200)
    os.kill(program.pid, number)
    assert program.wait(60) == 1
    assert "miles-spmd: error: interrupted; the processes of the run were killed\n" in output[1].read_text()
    marked = f"{VARIABLE}={tmp_path}"
    assert not [pid for pid in psutil.pids() if marked in _environ(pid)]


def _environ(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""


def test_it_does_not_touch_the_results_of_an_earlier_one(tmp_path: Path, checkpoint: Path) -> None:
    config = recipe(tmp_path, checkpoint, 3)
    metrics = tmp_path / "runs" / "tiny-chaos" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"step": 2}\n')
    done = forked.run("-m", "miles_spmd", "chaos", config, "--faults=kil@train.1", folder=tmp_path)
    assert done.returncode == 2
    assert "--faults: kil@train.1: unknown kind 'kil'; did you mean kill" in done.stderr
    done = forked.run("-m", "miles_spmd", "chaos", config, "--faults=kill@train.1", folder=tmp_path)
    assert done.returncode == 2
    said = "run.name: {} has the metrics of 2 steps of an earlier run; choose another run.name to keep it, or set "
    assert said.format(metrics.parent) + "run.overwrite=true to delete it" in done.stderr
    assert [path.name for path in metrics.parent.iterdir()] == ["metrics.jsonl"]
