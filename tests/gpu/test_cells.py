"""Cells on GPUs of their own, which exchange gradients over NCCL: the run of one world of ranks, also when one dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.quickstart.__main__ import GRPO
from tests.gpu import machine
from tests.gpu.test_grpo import grpo, grpo_settings, run_settings

STEPS = 110  # so many that the lost cell is back before the last one
EXACT = ["determinism.deterministic=true", "train.reduction_leaves=8"]
CELLS = ["resilience.cells=2", "resilience.standby=true", "--faults=kill:rank1@train.5"]


@machine.needs(2)
def test_a_cell_dies_and_comes_back(warm: Path) -> None:
    grpo(warm, "whole", 2, STEPS, *EXACT)
    command = [sys.executable, "-m", "miles_spmd", "chaos", str(GRPO), "--nproc-per-node=1"]
    settings = [*run_settings(warm, "cells"), *grpo_settings(warm, STEPS)]
    done = subprocess.run(
        [*command, *settings, *EXACT, *CELLS], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    machine.measured("cells of the quickstart", dict(enumerate(done.stdout.splitlines()[-4:])))
    assert "cell 1 takes part again" in (warm / "cells-chaos" / "faults" / "start-1.log").read_text()
    comparison = compare(verify(warm / "cells-chaos"), verify(warm / "whole"))
    assert comparison.equal, comparison.difference
    assert len(comparison.steps) == STEPS
