"""Runs whose ranks are divided into cells, with real processes: whichever of them is hurt, the run is the same."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from miles_spmd.controller.checkpoint_folders import newest, step_folder
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests.worker.launched import START_SECONDS, Launch, Launched
from tests.worker.strike import Strike, struck, write

STEPS = 60
END_SECONDS = 180
REWARD = "tests.worker.rewards:by_length_slowly"
EXACT: dict[str, Any] = {"run": {"num_rollout": STEPS, "overwrite": True}, "train": {"reduction_leaves": 4}}
CELLS: dict[str, Any] = EXACT | {"resilience": {"cells": 2, "cell_timeout": 3.0}}


def finished(run: Launched, seconds: float = END_SECONDS) -> Launched:
    assert run.launcher.wait(seconds) == 0, run.report()
    run.wait_for_end()
    return run


def same_as_one_world(run: Launched, launch: Launch) -> None:
    """The ledger of a run is that of ranks that were never divided, nor hurt."""
    kept = run.run_dir.rename(run.run_dir.with_name("of_cells"))
    whole = finished(launch(**EXACT))
    comparison = compare(verify(kept), verify(whole.run_dir))
    assert comparison.equal, comparison.difference
    assert len(comparison.steps) == STEPS


Hurt = Callable[..., tuple[Path, list[str]]]


@pytest.fixture
def hurt(tmp_path: Path, launch: Launch, one_world: dict[str, Path]) -> Hurt:
    """Make a short run with cells of ``ranks`` ranks, hurt it, and compare it with that of one world. Return its folder
    and its warnings. ``slowly``: the steps take a while, so that a cell is back before the last one."""

    def finish(
        *strikes: Strike, cells: int = 2, ranks: int = 1, slowly: bool = False, **changes: dict[str, Any]
    ) -> tuple[Path, list[str]]:
        settings: dict[str, Any] = {
            "train": {"reduction_leaves": 4},
            "reward": {"rm_type": REWARD},
            **changes,
            "run": {"num_rollout": 8, "overwrite": True} | changes.get("run", {}),
        }
        of_cells = {"cells": cells, "cell_timeout": 3.0}
        variables = write(tmp_path, strikes) | ({"SLOWLY": str(tmp_path)} if slowly else {})
        run = launch(ranks=ranks, variables=variables, **settings | {"resilience": of_cells})
        finished(run)
        assert struck(tmp_path) == len(strikes), run.report()
        lines, kept = warnings(run), run.run_dir.rename(tmp_path / "of_cells")
        key = str((cells, ranks, sorted(changes.items())))
        if key not in one_world:
            whole = finished(launch(ranks=cells * ranks, **settings))
            one_world[key] = whole.run_dir.rename(tmp_path / "one_world")
        comparison = compare(verify(kept), verify(one_world[key]))
        assert comparison.equal, comparison.difference
        assert len(comparison.steps) == settings["run"]["num_rollout"]
        return kept, lines

    return finish


@pytest.fixture(scope="module")
def one_world() -> dict[str, Path]:
    """The folders of runs that were never divided, nor hurt."""
    return {}


def pid_of(run: Launched, rank: int) -> int:
    log = (run.run_dir / "logs" / "latest" / f"rank-{rank}.log").read_text()
    return int(re.findall(r"pid (\d+)", log)[0])


def warnings(run: Launched) -> list[str]:
    """What was said about cells: on a machine that does other things, too, a rank may be slower than its peers."""
    lines = [line.removeprefix("miles-spmd: ") for line in run.stderr().splitlines()]
    return [line for line in lines if "as slow as its peers" not in line]


def wait_for(run: Launched, text: str, count: int = 1) -> None:
    end = time.monotonic() + START_SECONDS
    while run.stderr().count(text) < count:
        assert time.monotonic() < end, run.report()
        assert run.launcher.poll() is None, run.report()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_of_each_cell_dies(launch: Launch) -> None:
    """What a user writes into the configuration meanwhile, and takes away of the data, is for another run."""
    run = launch(ranks=1, **CELLS)
    run.wait_for_steps(3)
    for name in ("config.toml", "data.jsonl"):
        (run.folder / name).write_text("megatron.lr = 1.0\n")
    os.kill(pid_of(run, 1), signal.SIGKILL)
    wait_for(run, "cell 1 takes part again")
    os.kill(pid_of(run, 0), signal.SIGKILL)
    wait_for(run, "cell 0 takes part again")
    finished(run)
    lost, back, other, again = warnings(run)
    assert re.search(r"rank 1 \(.+ died: .*; the run goes on without cell 1 \(.+\), which is started again", lost)
    assert re.search(r"step \d+: cell 1 takes part again", back)
    assert "rank 0" in other
    assert "cell 0 takes part again" in again
    logs = {path.name for path in (run.run_dir / "logs" / "latest").glob("rank-*.log")}
    assert logs == {"rank-0.log", "rank-0.1.log", "rank-1.log", "rank-1.1.log"}
    same_as_one_world(run, launch)


@pytest.mark.slow
def test_the_cell_that_writes_checkpoints_dies_twice(hurt: Hurt) -> None:
    """One that comes back does not speak for the saves of the other, and what was lost with a cell is no sign of files
    that cannot be written."""
    early, late = Strike(0, "FinishSave", 1), Strike(0, "FinishSave", 1, start=1)
    folder, lines = hurt(early, late, run={"num_rollout": 16}, checkpoint={"save_interval": 1})
    assert len([line for line in lines if "is left unfinished, because cell 0, which wrote it, was lost" in line]) == 2
    assert newest(folder) == step_folder(folder, 16)


@pytest.mark.slow
def test_the_cell_that_writes_the_last_checkpoint_dies(hurt: Hurt) -> None:
    """It is written again, and has no second entry in the ledger. The run does not wait for the cell that is being
    started again."""
    folder, _ = hurt(Strike(0, "FinishSave"), checkpoint={"save_interval": 0, "save_final": True})
    assert newest(folder) == step_folder(folder, 8)


def test_a_cell_is_too_late_for_the_first_meeting(hurt: Hurt) -> None:
    """The other one has met nobody by then, and has nothing to wait for. Neither of them is lost."""
    _, lines = hurt(Strike(0, "MeetCells", seconds=2.0), run={"num_rollout": 3})
    assert lines == []


@pytest.mark.slow
def test_an_engine_hangs(hurt: Hurt) -> None:
    """It does not return from a step. The other one has not replied, either, and is not lost."""
    hangs = Strike(1, "EngineStep", 20, seconds=600.0)
    _, lines = hurt(hangs, run={"num_rollout": 16}, deadlines={"engine_step_timeout": 2.0})
    assert re.match(r"warning: rollout, step \d+: the engine of rank 1 did not return from a step within 2 s", lines[0])
    assert sum("the run goes on without cell" in line for line in lines) == 1


@pytest.mark.slow
def test_a_cell_dies_while_it_receives_the_state(hurt: Hurt) -> None:
    strikes = Strike(1, "ComputePart", 3), Strike(1, "ReceiveState", call=100, start=1)
    _, (lost, again, back) = hurt(*strikes, slowly=True, run={"num_rollout": 24})
    assert "rank 1" in lost
    assert "rank 1" in again
    assert "cell 1 takes part again" in back


@pytest.mark.slow
def test_a_cell_dies_while_it_sends_its_state(hurt: Hurt) -> None:
    """Another one sends it."""
    strikes = Strike(1, "ComputePart", 3), Strike(0, "SendState", call=500)
    _, lines = hurt(*strikes, cells=4, slowly=True, run={"num_rollout": 16})
    assert len(lines) == 4
    assert all("takes part again" in line for line in lines[2:])


def rows(path: Path) -> dict[str, Any]:
    """Settings of data whose rows are prompts and pairs; their labels are those of `tests/environments/samples.py`."""
    found = [
        {
            "prompt": f"{n} + {n}",
            "label": "once" if n % 3 else "fork",
            "chosen": f"{2 * n}",
            "rejected": f"{2 * n + 3}",
        }
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    held = {"eval_prompt_data": {"held": str(path)}, "eval_interval": 2}
    return {"data": {"prompt_data": str(path)}, "eval": held}


def test_a_hook_sees_the_weights_of_each_update_once(hurt: Hurt, tmp_path: Path) -> None:
    """The other cell dies in an exchange, whereupon its part is computed, and the update repeated. One world of the
    same run makes the same calls."""
    train = {"reduction_leaves": 4, "trainer_hook": "tests.worker.hooks:note"}
    hurt(Strike(1, "Exchange", 2), run={"num_rollout": 4}, train=train)
    calls = (tmp_path / "hook-0of2.txt").read_text().splitlines()
    assert calls == (tmp_path / "hook-0.txt").read_text().splitlines()
    assert [call.split()[:2] for call in calls if "train" in call] == [["train", "begins"], ["train", "ends"]] * 4
    assert len({call.split()[2] for call in calls}) == 5  # the weights change with each update


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dpo", "rm"])
def test_pairs(hurt: Hurt, tmp_path: Path, mode: str) -> None:
    settings = {"run": {"mode": mode, "num_rollout": 24}, "train": {"reduction_leaves": 4, "global_batch_size": 8}}
    _, lines = hurt(
        Strike(1, "ComputePart", 3), Strike(0, "MakeUpdate", 14), **settings, **rows(tmp_path / "rows.jsonl")
    )
    assert sum("the run goes on without" in line for line in lines) == 2


@pytest.mark.slow
def test_environments_evaluations_and_a_filter(hurt: Hurt, tmp_path: Path) -> None:
    """What an environment has said and was given is not asked for again: only the turn that was lost is generated
    again."""
    _, lines = hurt(
        Strike(1, "EngineStep", 25, 3),
        Strike(0, "EngineStep", 160, 3),
        run={"num_rollout": 14},
        environment={"environment": "tests.environments.samples:behave"},
        algorithm={"dynamic_sampling_filter": "reward_nonzero_std"},
        reward={"rm_type": "tests.recipe_run:coin"},
        **rows(tmp_path / "rows.jsonl"),
    )
    assert sum("the run goes on without" in line for line in lines) == 2


@pytest.mark.slow
def test_agents_that_have_sessions(hurt: Hurt) -> None:
    """An agent does not notice that the engine of its session is lost."""
    _, lines = hurt(
        Strike(1, "EngineStep", 25),
        Strike(0, "EngineStep", 160),
        run={"num_rollout": 14},
        environment={"environment": "tests.environments.agent_samples:texts", "environment_timeout": 200.0},
    )
    assert sum("the run goes on without cell" in line for line in lines) == 2


@pytest.mark.slow
def test_partial_rollouts_go_on(launch: Launch, tmp_path: Path) -> None:
    """They are not repeatable, so no ledger is compared."""
    strikes = [Strike(1, "EngineStep", 30), Strike(0, "EngineStep", 90)]
    partial = {"over_sampling_batch_size": 8, "partial_rollout": True}
    run = launch(ranks=1, variables=write(tmp_path, strikes), rollout=partial, **CELLS | {"run": {"num_rollout": 30}})
    finished(run)
    assert struck(tmp_path) == 2
    assert sum("takes part again" in line for line in warnings(run)) == 2


@pytest.mark.slow
def test_a_cell_dies_while_a_checkpoint_is_loaded(hurt: Hurt, launch: Launch) -> None:
    """The run of one world is continued by cells, of which the other one begins alone."""
    settings: dict[str, Any] = {"train": {"reduction_leaves": 4}, "reward": {"rm_type": REWARD}}
    finished(launch(**settings, run={"num_rollout": 4, "overwrite": True}, checkpoint={"save_interval": 2}))
    settings |= {"run": {"overwrite": False}, "checkpoint": {"save_interval": 2, "resume": True}}
    _, (lost, back) = hurt(Strike(0, "LoadCheckpoint"), slowly=True, **settings)
    assert "rank 0" in lost
    assert "checkpoint, step 4" in lost
    assert "cell 0 takes part again" in back


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["launcher", "supervisor"])
def test_no_process_is_left(launch: Launch, dies: str) -> None:
    """A rank that is stopped does not notice that its launcher was killed, so the supervisor kills it."""
    settings = {"resilience": {"cells": 2}, "train": {"reduction_leaves": 4}, "run": {"num_rollout": 12}}
    run = launch(ranks=1, preloaded=False, **settings)
    run.wait_for_steps(3)
    rank = psutil.Process(pid_of(run, 1))
    if dies == "supervisor":
        os.kill(run.launcher.pid, signal.SIGKILL)
        run.launcher.wait()
        run.wait_for_end(15)
        assert run.stderr().endswith("the supervisor died\n")
        return
    rank.suspend()
    rank.parent().kill()
    wait_for(run, "cell 1 has ended: its launcher was killed by SIGKILL; the run goes on without cell 1")
    rank.wait(5)
    finished(run)
