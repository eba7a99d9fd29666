"""Sessions on an engine whose cache is too small for all of them, in a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import METRICS_FILE
from tests.bench.test_parts import tiny_with_tokenizer

RUN = [
    *("run.num_rollout=2", "data.label_key=''", "reward.rm_type=miles_spmd.bench.step:by_chance"),
    *("rollout_batch_size=8", "n_samples_per_prompt=4", "rollout_max_response_len=72", "model.dtype=float32"),
    *("determinism.deterministic=true", "sglang.max_total_tokens=500", "train.max_tokens_per_gpu=4096"),
    "environment.environment=miles_spmd.bench.turns:turns",
    "environment.environment_kwargs={turns = 5, new_tokens = 8, given = 8}",
    *("checkpoint.save_final=false", "checkpoint.export_final=false", "telemetry.progress=none"),
]


@pytest.mark.slow
def test_order_changes_and_nothing_else(tmp_path: Path) -> None:
    rows = ({"prompt": f"{letter} {i}: the history of a session"} for i in range(8) for letter in "abcd")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_with_tokenizer(tmp_path / "model")
    (tmp_path / "run.toml").write_text(
        f"model.hf_checkpoint = '{model}'\ndata.prompt_data = '{tmp_path / 'prompts.jsonl'}'\nmegatron.lr = 1e-3\n"
    )
    hits, sessions = [], []
    for name, share in (("at_once", 0), ("as_fit", 1)):
        settings = [*RUN, f"run.output_dir={tmp_path}", f"run.name={name}", f"environment_cache_share={share}"]
        command = [sys.executable, "-m", "miles_spmd", "train", str(tmp_path / "run.toml"), "--nproc-per-node=1"]
        done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        last = read_metrics(tmp_path / name / METRICS_FILE)[2]
        hits.append(last["rollout/prefix_hit_rate"])
        sessions.append(last["rollout/sessions_max"])
    found = compare(verify(tmp_path / "at_once"), verify(tmp_path / "as_fit"))
    assert found.equal, found.difference
    assert found.layout == ["environment.environment_cache_share: 0.0 | 1.0"]
    assert sessions[0] == 32 > sessions[1]
    assert hits[1] > 2 * hits[0]
