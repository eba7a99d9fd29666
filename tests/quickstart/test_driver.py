"""The quickstart itself, cut down to a few steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests import forked

REPOSITORY = Path(__file__).parents[2]


def quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "miles_spmd.quickstart", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_quickstart_leaves_what_it_promises(tmp_path: Path) -> None:
    short = [
        *("--sft", "num_rollout=25", "--sft", "lr_warmup_iters=2"),
        *("--grpo", "num_rollout=3", "--grpo", "eval_interval=3", "--grpo", "rollout_batch_size=8"),
        *("--install-seconds", "12.34"),
    ]
    done = forked.run(Path(__file__).with_name("forked_warm_up.py"), *short, folder=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "miles-spmd: " not in done.stderr
    root = tmp_path / "runs" / "quickstart"
    summary = json.loads((root / "summary.json").read_text())
    assert set(summary) >= {
        "accuracy_before",
        "accuracy_after",
        "train_seconds",
        "install_seconds",
        "steps",
        "parity_tokens",
        "parity_mismatches",
        "rollout_train_logprob_max_abs_diff",
        "refit_checksum_mismatches",
    }
    assert (summary["steps"], summary["warmup_steps"], summary["install_seconds"]) == (3, 25, 12.3)
    assert summary["parity_tokens"] > 3 * 8 * 8  # of three rollouts of 8 prompts x 8 answers of a few tokens
    assert summary["parity_mismatches"] == summary["rollout_train_logprob_max_abs_diff"] == 0
    assert summary["refit_checksum_mismatches"] == 0
    scores = [
        json.loads(line).get("eval/heldout") for line in (root / "grpo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert scores[0] == summary["accuracy_before"]
    assert scores[-1] == summary["accuracy_after"]
    agreement, last = done.stdout.splitlines()[-2:]
    tokens = f"{summary['parity_tokens']:,.0f} tokens"
    assert agreement == f"quickstart: log-probs of engine and trainer differ on 0 of {tokens}"
    said = re.fullmatch(r"quickstart: held-out accuracy (\S+) -> (\S+) in (\d+) s", last)
    assert said, last
    assert said.groups() == (
        f"{summary['accuracy_before']:.2f}",
        f"{summary['accuracy_after']:.2f}",
        f"{summary['train_seconds']:.0f}",
    )
    assert "Held-out accuracy" in (root / "report.html").read_text()
    for stage in ("sft", "grpo"):
        assert (root / stage / "config.toml").is_file()
        assert (root / stage / "export" / "model.safetensors").is_file()


def test_a_stage_that_fails_ends_it(tmp_path: Path) -> None:
    done = quickstart(tmp_path, "--sft", "prompt_data=absent.jsonl")
    assert done.returncode == 2
    assert done.stderr.splitlines()[1].strip() == "data.prompt_data: no file absent.jsonl"
    assert not (tmp_path / "runs" / "quickstart" / "summary.json").exists()


def test_a_wrong_override_ends_it_before_anything_is_made(tmp_path: Path) -> None:
    done = quickstart(tmp_path, "--grpo", "num_rolout=3")
    assert done.returncode == 2
    assert "did you mean num_rollout?" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
