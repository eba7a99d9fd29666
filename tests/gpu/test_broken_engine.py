"""An engine that raises while it generates is replaced: the run is the same, and the old engine's memory is free."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests.gpu import machine
from tests.gpu.test_grpo import grpo
from tests.worker import held


@machine.needs(1)
def test_a_new_engine_has_the_memory_of_the_old_one(warm: Path) -> None:
    grpo(warm, "whole", 1, 3, "determinism.deterministic=true")
    hurt, recipe = warm / "hurt" / "whole", warm / "hurt.toml"
    config = (warm / "whole" / "config.toml").read_text()
    recipe.write_text(re.sub(r"(?m)^output_dir = .*$", f'output_dir = "{hurt.parent}"', config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*torchrun, held.__file__, str(recipe), "rollout", "0", "engine"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the engines are replaced" in done.stderr
    comparison = compare(verify(warm / "whole"), verify(hurt))
    assert comparison.equal, comparison.difference
    log = (hurt / "logs" / "latest" / "rank-0.log").read_text()
    free = {what: float(left) for what, left in re.findall(r"memory, \w+ \d+, (.*?): .*; ([\d.]+) GiB free", log)}
    first = free["engine built"]
    machine.measured(
        "GiB free after an engine was built", {"the first": first, "its replacement": free["engine replaced"]}
    )
    assert free["engine replaced"] > first - 2.0  # a second engine's weights and cache would be 40 GiB
