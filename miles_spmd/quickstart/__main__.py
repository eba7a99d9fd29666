"""The quickstart from end to end: assets, supervised warm-up, GRPO, summary, report. See launch/quickstart.sh."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

from miles_spmd.config import Config
from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.quickstart.assets import SUMS, TASKS, build_assets
from miles_spmd.telemetry.report import Stage, read_stages, write_report
from miles_spmd.types.files import with_remedy, write_whole

CONFIGS = Path(__file__).parents[2] / "configs"
RANKS = 2


def recipes(task: str) -> tuple[Path, Path]:
    """Return the recipes of a task's warm-up and of its GRPO run."""
    stem = "quickstart" if task == SUMS else f"environments/{task}"
    return CONFIGS / f"{stem}_sft.toml", CONFIGS / f"{stem}_grpo.toml"


SFT, GRPO = recipes(SUMS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__)
    parser.add_argument("--task", choices=TASKS, default=SUMS, help="what is learned (docs/environments.md)")
    parser.add_argument("--install-seconds", type=float, default=0.0, help="duration of the set-up, for the summary")
    parser.add_argument("--sft", action="append", default=[], metavar="KEY=VALUE", help="override of the warm-up")
    parser.add_argument("--grpo", action="append", default=[], metavar="KEY=VALUE", help="override of the GRPO run")
    arguments = parser.parse_args()

    sft_recipe, grpo_recipe = recipes(arguments.task)
    try:
        sft = load_config(sft_recipe, arguments.sft, check_files=False)
        grpo = load_config(grpo_recipe, arguments.grpo, check_files=False)
    except ConfigError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        run(sft, grpo, arguments)
    except OSError as error:
        print(f"quickstart: error: {with_remedy(str(error))}", file=sys.stderr)
        sys.exit(1)


def run(sft: Config, grpo: Config, arguments: argparse.Namespace) -> None:
    """Train, and print what came of it. Raises OSError where something cannot be written."""
    build_assets(sft.model.hf_checkpoint.parent, name=arguments.task)
    sft_recipe, grpo_recipe = recipes(arguments.task)
    started = time.monotonic()
    train(sft_recipe, sft, arguments.sft)  # its export is where GRPO starts
    train(grpo_recipe, grpo, arguments.grpo)
    train_seconds = round(time.monotonic() - started, 1)

    root = grpo.run_dir.parent
    stages = {stage.name: stage for stage in read_stages(root)}
    summary = summarize(stages[sft.run.name], stages[grpo.run.name])
    summary |= {"train_seconds": train_seconds, "install_seconds": round(arguments.install_seconds, 1)}
    write_whole(root / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    print(f"quickstart: report {write_report(root)}")
    print(f"quickstart: model {grpo.run_dir / 'export'}")
    differing, compared = summary["parity_mismatches"], summary["parity_tokens"]
    print(f"quickstart: log-probs of engine and trainer differ on {differing:,.0f} of {compared:,.0f} tokens")
    scores = stages[grpo.run.name].scores()
    for name, series in scores.items():
        what = "held-out accuracy" if len(scores) == 1 else f"held-out accuracy, {name}"
        print(f"quickstart: {what} {series[0][1]:.2f} -> {series[-1][1]:.2f} in {train_seconds:.0f} s")


def train(recipe: Path, config: Config, overrides: list[str]) -> None:
    """Run ``miles-spmd train`` in a fresh run folder. Where it fails it has printed why, and this program exits with
    its status."""
    shutil.rmtree(config.run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "miles_spmd", "train", str(recipe), *overrides, "--nproc-per-node", str(RANKS)]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


def summarize(sft: Stage, grpo: Stage) -> dict[str, float]:
    """Return held-out accuracy before and after GRPO, the mean over the held-out sets, and how far engine and trainer
    agreed during it."""
    scores = grpo.scores().values()
    return {
        "accuracy_before": fmean(series[0][1] for series in scores),
        "accuracy_after": fmean(series[-1][1] for series in scores),
        "steps": grpo.done,
        "warmup_steps": sft.done,
        "parity_tokens": sum(grpo.values("parity/tokens")),
        "parity_mismatches": sum(grpo.values("parity/mismatches")),
        "rollout_train_logprob_max_abs_diff": max(grpo.values("train/train_rollout_logprob_abs_diff_max")),
        "refit_checksum_mismatches": sum(
            sft.values("refit/checksum_mismatches") + grpo.values("refit/checksum_mismatches")
        ),
    }


if __name__ == "__main__":
    main()
