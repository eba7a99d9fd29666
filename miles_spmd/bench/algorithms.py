"""Held-out accuracy before and after training with every recipe of configs/algorithms, on the quickstart's task.

All start from the quickstart's warm-up. Recipes that generate train on the same number of samples, or on fewer where
they have fewer; samples that a filter drops come on top. The accuracy of preference recipes is that on held-out pairs.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from miles_spmd.bench.result import Row, make_result
from miles_spmd.bench.run import publish
from miles_spmd.config.checks import checkpoint_shape
from miles_spmd.config.load import load_config
from miles_spmd.telemetry.metrics import is_score
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import METRICS_FILE

RECIPES = Path(__file__).parents[2] / "configs" / "algorithms"


class Outcome(NamedTuple):
    before: float
    after: float
    seconds: float


def bench_algorithms(recipes: Sequence[Path] | None, seeds: int, samples: int, jobs: int, out: Path | None) -> None:
    """Run every recipe with seeds 1 to ``seeds`` and publish the accuracies. A run that fails prints why and counts as
    NaN. Raises FileNotFoundError where recipes or their models are missing."""
    recipes = recipes or [path for path in sorted(RECIPES.glob("*.toml")) if path.stem != "sft"]
    absent = [str(recipe) for recipe in recipes if not recipe.is_file()]
    absent += [
        str(f)
        for f in {load_config(r, check_files=False).model.hf_checkpoint for r in recipes}
        if checkpoint_shape(f) is None
    ]
    if absent:
        raise FileNotFoundError(f"missing: {', '.join(absent)}; run launch/quickstart.sh, which makes the models")
    tasks = [(recipe, seed) for recipe in recipes for seed in range(1, seeds + 1)]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(lambda task: _run(task[0], task[1], samples), tasks))
    rows = [_row(recipe, outcomes[i * seeds : (i + 1) * seeds]) for i, recipe in enumerate(recipes)]
    settings = {"seeds": seeds, "samples": samples, "jobs": jobs}
    publish(make_result("algorithms", "quickstart", 1, settings, rows), out)


def _run(recipe: Path, seed: int, samples: int) -> Outcome:
    config = load_config(recipe, check_files=False)
    each = config.rollout.rollout_batch_size * config.rollout.n_samples_per_prompt
    steps = min(config.run.num_rollout, samples // each) if config.run.mode == "rl" else config.run.num_rollout
    with tempfile.TemporaryDirectory(prefix="miles-spmd-bench-") as scratch:
        overrides = {
            "run.seed": seed,
            "run.num_rollout": steps,
            "run.output_dir": scratch,
            "eval.eval_interval": steps,
            "checkpoint.export_final": "false",
            "telemetry.progress": "none",
            "telemetry.num_transcripts": 0,
        }
        settings = [f"{name}={value}" for name, value in overrides.items()]
        command = [sys.executable, "-m", "miles_spmd", "train", str(recipe), *settings, "--nproc-per-node=1"]
        began = time.monotonic()
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
        )
        seconds = time.monotonic() - began
        if done.returncode:
            print(f"{recipe.stem}, seed {seed}: {done.stderr.strip()}", file=sys.stderr)
            return Outcome(math.nan, math.nan, seconds)
        steps_done = read_metrics(Path(scratch) / config.run.name / METRICS_FILE).values()
    scores = [value for metrics in steps_done for name, value in metrics.items() if is_score(name)]
    print(f"{recipe.stem}, seed {seed}: {scores[0]:.3f} -> {scores[-1]:.3f} in {seconds:.0f} s", file=sys.stderr)
    return Outcome(scores[0], scores[-1], seconds)


def _row(recipe: Path, outcomes: Sequence[Outcome]) -> Row:
    after = [outcome.after for outcome in outcomes]
    return {
        "recipe": recipe.stem,
        "before": outcomes[0].before,
        "after, mean": statistics.mean(after),
        "worst": min(after),
        "best": max(after),
        "seconds a run": statistics.mean(outcome.seconds for outcome in outcomes),
    }
