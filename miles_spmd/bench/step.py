"""Time of a whole GRPO step, by phase: ``miles-spmd train`` on random prompts of one length, with responses of the
maximum length and random rewards."""

from __future__ import annotations

import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomli_w

from miles_spmd.bench.result import Row
from miles_spmd.telemetry.metrics import phase_times
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import METRICS_FILE


def by_chance(sample: Any) -> float:
    """Return a random reward, seeded by the token ids: most tokens of a random model have no text."""
    return random.Random(str(sample.response)).random()


def bench_step(
    model: str,
    ranks: int,
    overrides: list[str],
    prompts: int,
    samples: int,
    prompt_tokens: int,
    response_tokens: int,
    warm_up: int,
    steps: int,
) -> list[Row]:
    """Return one row, with medians over ``steps`` steps that follow ``warm_up`` ones, in which kernels are compiled.
    ``prompt_tokens`` counts characters, each of which is a token of a ``random:`` model."""
    with tempfile.TemporaryDirectory(prefix="miles-spmd-bench-") as scratch:
        folder = Path(scratch)
        generator = random.Random(0)
        lines = ("".join(generator.choices(string.ascii_lowercase, k=prompt_tokens)) for _ in range(4 * prompts))
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
        settings = {
            "run": {"name": "run", "output_dir": scratch, "num_rollout": warm_up + steps},
            "model": {"hf_checkpoint": model},
            "data": {
                "prompt_data": str(folder / "prompts.jsonl"),
                "label_key": "",
                "rollout_max_prompt_len": prompt_tokens,
            },
            "rollout": {
                "rollout_batch_size": prompts,
                "n_samples_per_prompt": samples,
                "rollout_max_response_len": response_tokens,
            },
            "reward": {"rm_type": "miles_spmd.bench.step:by_chance"},
            "train": {"max_tokens_per_gpu": 16384},
            "checkpoint": {"export_final": False},
            "telemetry": {"progress": "none"},
            "megatron": {"lr": 1e-6, "clip_grad": 1.0, "use_distributed_optimizer": True},
        }
        recipe = folder / "recipe.toml"
        recipe.write_text(tomli_w.dumps(settings))
        command = [sys.executable, "-m", "miles_spmd", "train", str(recipe), *overrides, f"--nproc-per-node={ranks}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        metrics = [values for step, values in read_metrics(folder / "run" / METRICS_FILE).items() if step > warm_up]
    times = [phase_times(values) for values in metrics]
    step = statistics.median(values["perf/step_time"] for values in metrics)
    return [
        {
            "step": f"{prompts} x {samples} x ({prompt_tokens} + {response_tokens})",
            "step s": step,
            **{f"{phase} s": statistics.median(t[phase] for t in times) for phase in times[0]},
            "response tokens/s per GPU": prompts * samples * response_tokens / step / ranks,
            "tokens behind a prompt": statistics.median(values["rollout/response_len"] for values in metrics),
            "prefix hits": statistics.median(values.get("rollout/prefix_hit_rate", 0.0) for values in metrics),
            "sessions at a time": max(values.get("rollout/sessions_max", 0.0) for values in metrics),
        }
    ]
