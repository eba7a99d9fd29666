"""`miles-spmd warm`: compile once, keep it for the next start on any node."""

from __future__ import annotations

import json
import re
from pathlib import Path

from miles_spmd.platform.kernel_cache import FOLDERS
from tests import forked
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config


def test_what_a_warm_up_compiled_is_there_on_the_next_node(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        write_checkpoint(tmp_path / "model"),
        run={"kernel_cache": str(tmp_path / "shared")},
        rollout={"engine": REFERENCE_ENGINE, "rollout_max_response_len": 64},
        algorithm={"loss_type": "tests.worker.losses:compiles", "dynamic_sampling_filter": "reward_nonzero_std"},
        eval={"eval_interval": 1, "eval_prompt_data": {"held_out": str(tmp_path / "data.jsonl")}},
    )
    warmed = []
    for node in ("a", "b"):
        disk = tmp_path / node
        disk.mkdir()
        done = forked.run(
            *("-m", "miles_spmd", "warm", config, "--nproc-per-node=2"),
            folder=tmp_path,
            environment=dict.fromkeys(FOLDERS, "") | {"TMPDIR": str(disk)},
        )
        assert done.returncode == 0, done.stderr
        found = re.search(
            r"^warm: [\d.]+ s, (\d+) kernels compiled, (\d+) files found, kept in (.+)$", done.stderr, re.M
        )
        assert found, done.stderr
        warmed.append((int(found[1]), int(found[2])))
        assert Path(found[3]).parent == tmp_path / "shared"
    assert warmed == [(1, 0), (0, 1)]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny-warm"]
    (step,) = (tmp_path / "runs" / "tiny-warm" / "rollouts.jsonl").read_text().splitlines()
    assert 0 < json.loads(step)["best"]["tokens"] <= 8
