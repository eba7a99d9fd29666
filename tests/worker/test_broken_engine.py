"""An engine raises an exception while it generates: a new one takes its place, and the run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles_spmd.types.phase import Phase
from tests.worker.launched import START_SECONDS, Launch, Launched

EXACT: dict[str, Any] = {
    "run": {"overwrite": True},
    "rollout": {"engine": "sglang"},
    "determinism": {"deterministic": True},
}


def ledger(run: Launched) -> bytes:
    return (Path(run.run_dir) / "ledger" / "chain.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("rank", "sglang"),
    [(1, {}), pytest.param(-1, {"tp_size": 2}, marks=pytest.mark.slow)],
    ids=["of two", "of two ranks"],
)
def test_the_run_goes_on_and_is_the_same(launch: Launch, rank: int, sglang: dict[str, Any]) -> None:
    settings = EXACT | ({"sglang": sglang} if sglang else {})
    whole = launch(**settings)
    assert whole.launcher.wait(START_SECONDS) == 0, whole.report()
    expected = ledger(whole)
    hurt = launch(Phase.ROLLOUT, rank, "engine", **settings)
    assert hurt.launcher.wait(START_SECONDS) == 0, hurt.report()
    (line,) = [line for line in hurt.stderr().splitlines() if line.startswith("miles-spmd: ")]
    assert "rollout, step 0: RuntimeError: the deed is done; the engines are replaced, and " in line
    assert ledger(hurt) == expected


@pytest.mark.slow
def test_an_engine_of_a_second_policy_is_replaced(launch: Launch) -> None:
    settings = EXACT | {
        "environment": {"environment": "tests.controller.duel:duel", "environment_workers": 1},
        "second_policy": {"second_num_gpus": 1, "second_roles": ["second"]},
    }
    whole = launch(**settings)
    assert whole.launcher.wait(START_SECONDS) == 0, whole.report()
    expected = ledger(whole)
    hurt = launch(Phase.ROLLOUT, 1, "engine", **settings)
    assert hurt.launcher.wait(START_SECONDS) == 0, hurt.report()
    (line,) = [line for line in hurt.stderr().splitlines() if line.startswith("miles-spmd: ")]
    assert "step 0, second policy: RuntimeError: the deed is done; the engines are replaced, and " in line
    assert ledger(hurt) == expected


def test_an_engine_that_always_fails_ends_the_run(launch: Launch) -> None:
    run = launch(Phase.ROLLOUT, 1, "engines", rollout={"engine_replacements": 1})
    assert run.launcher.wait(START_SECONDS) != 0
    first, last = [line for line in run.stderr().splitlines() if line.startswith("miles-spmd: ")]
    assert first.startswith("miles-spmd: warning: rank 1 (")
    assert last.startswith("miles-spmd: rank 1 (")
    assert "rollout, step 0: RuntimeError: the deed is done (traceback in " in last
