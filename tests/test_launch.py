"""What launch/torchrun.sh and launch/bundle.sh refuse, and that the former starts ranks. What it sets for GPUs is seen
in tests/gpu.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import free_port

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "grpo_qwen3_0.6b.toml"
DRY_RUN = ["hf_checkpoint=random:qwen3-0.6b", f"prompt_data={RECIPE}", "--dry-run"]


def launch(*arguments: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHON": sys.executable} | variables
    command = [str(ROOT / "launch" / "torchrun.sh"), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "usage: launch/torchrun.sh CONFIG"),
        (["missing.toml"], {}, "no file missing.toml"),
        ([RECIPE], {"NPROC_PER_NODE": "0"}, "no GPU here"),
        ([RECIPE], {"NPROC_PER_NODE": "1", "NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        ([RECIPE], {"CUDA_VISIBLE_DEVICES": ""}, "no GPU here (CUDA_VISIBLE_DEVICES=); on a CPU use"),
    ],
)
def test_refusals(arguments: list[str], variables: dict[str, str], message: str) -> None:
    process = launch(*arguments, **variables)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: launch/bundle.sh OUT"),
        (["--te"], "usage: launch/bundle.sh OUT"),
        (["out", "--part-mib", "x"], "--part-mib needs a number"),
        (["out", "--te", "missing.whl"], "--te needs the wheel of transformer_engine_torch, not 'missing.whl'"),
        (["out", "--fa3", "x"], "unknown option --fa3"),
    ],
)
def test_no_bundle(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [ROOT / "launch" / "bundle.sh", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_nodes_on_one_machine(tmp_path: Path) -> None:
    """With a recipe named as it is seen from where the script is called."""
    meet = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meet["XDG_CACHE_HOME"] = str(tmp_path)
    shutil.copy(RECIPE, tmp_path)
    nodes = [launch(RECIPE.name, *DRY_RUN, cwd=tmp_path, NODE_RANK=rank, **meet) for rank in "01"]
    for node in nodes:
        output, error = node.communicate(timeout=120)
        assert node.returncode == 0, error
        assert "Ranks (2)" in output
