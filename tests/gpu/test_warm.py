"""How long a start takes without compiled kernels, with a node's own, and on another node with the archive."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.gpu.machine import measured, needs

WARM = re.compile(r"warm: ([\d.]+) s, (\d+) kernels compiled, (\d+) files found, kept in (\S+)")


def start(folder: Path, disk: str, model: Path, data: Path) -> tuple[float, int, int]:
    """Return the seconds, the kernels that were compiled, and the files that the archive had, of `miles-spmd warm` on a
    node whose own disk is the folder ``disk``."""
    (folder / disk).mkdir(exist_ok=True)
    recipe = folder / "run.toml"
    recipe.write_text(
        f'run = {{ output_dir = "{folder}/runs", kernel_cache = "{folder}/shared" }}\n'
        f'model.hf_checkpoint = "{model}"\ndata.prompt_data = "{data}"\nreward.rm_type = "exact"\n'
        "rollout = { rollout_batch_size = 16, n_samples_per_prompt = 4, rollout_max_response_len = 32 }\n"
    )
    unset = {name: value for name, value in os.environ.items() if "CACHE" not in name and name != "RANK"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "miles_spmd", "warm", str(recipe), "--nproc-per-node=1"],
        env=unset | {"TMPDIR": str(folder / disk)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = WARM.search(done.stderr)
    assert found, done.stderr
    return time.monotonic() - began, int(found[2]), int(found[3])


@needs(1)
def test_a_warm_start_compiles_nothing(warm: Path, tmp_path: Path) -> None:
    model, data = warm / "assets" / "model", warm / "assets" / "train.jsonl"
    cold, compiled, _ = start(tmp_path, "a", model, data)
    assert compiled > 0
    same, again, _ = start(tmp_path, "a", model, data)
    other, on_other, unpacked = start(tmp_path, "b", model, data)
    measured(
        "start and one short step of the quickstart's model",
        {
            "cold": f"{cold:.1f} s, {compiled} kernels compiled",
            "again on this node": f"{same:.1f} s, {again} compiled",
            "on another node": f"{other:.1f} s, {on_other} compiled, {unpacked} files found",
        },
    )
    assert (again, on_other) == (0, 0)
    assert unpacked > compiled
