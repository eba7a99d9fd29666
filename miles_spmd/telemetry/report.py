"""A run as one HTML file that needs nothing else: numbers, curves, transcripts, configuration, versions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from miles_spmd.telemetry import plots
from miles_spmd.telemetry.metrics import METRICS, describe
from miles_spmd.telemetry.progress import clock
from miles_spmd.telemetry.run_data import Series, Stage, read_stages
from miles_spmd.telemetry.transcripts import Transcript

REPORT_FILE = "report.html"

# title -> the metrics drawn together (label -> name), and whether on a logarithmic axis
CURVES: dict[str, tuple[dict[str, str], bool]] = {
    "Reward": ({"reward": "rollout/raw_reward"}, False),
    "Loss": ({"loss": "train/loss"}, False),
    "KL to the reference": ({"kl": "train/kl_loss"}, False),
    "KL to the teacher": ({"kl": "rollout/opd_reverse_kl"}, False),
    "Critic's loss": ({"loss": "train/critic_loss"}, False),
    "Variance that the critic explains": ({"explained": "rollout/value_explained_variance"}, False),
    "Pairs told apart": ({"accuracy": "train/reward_accuracy"}, False),
    "Policy change within a step": ({"ppo kl": "train/ppo_kl"}, False),
    "Response length": ({"mean": "rollout/response_len", "longest": "rollout/response_len_max"}, False),
    "Entropy": ({"entropy": "train/entropy_loss"}, False),
    "Gradient norm": ({"norm": "train/grad_norm"}, False),
    "Groups without a gradient": ({"zero std": "rollout/zero_std_ratio"}, False),
    "Answers cut off": ({"truncated": "rollout/truncated_ratio"}, False),
    "Engine against trainer": (
        {
            "mean": "train/train_rollout_logprob_abs_diff",
            "largest": "train/train_rollout_logprob_abs_diff_max",
        },
        True,
    ),
    "KL between engine and trainer": ({"kl": "train/train_rollout_kl"}, False),
    "Throughput": ({"tokens": "perf/tokens_per_gpu_per_second"}, False),
}


@dataclass(frozen=True)
class Number:
    """A headline number."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Pair:
    """The same prompt in the first and the last evaluation that asked it."""

    first: Transcript
    last: Transcript


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` from whatever is there: a run or several stages, finished or not.

    Raises FileNotFoundError when there is no run at all.
    """
    stages = read_stages(run_dir)
    scored = [stage for stage in stages if stage.scores()]
    page = _template().render(
        title=run_dir.resolve().name,
        written=time.strftime("%Y-%m-%d %H:%M"),
        finished=all(stage.finished for stage in stages),
        numbers=headline(stages),
        accuracy=Markup(plots.accuracy(scored)) if scored else None,
        stages=[_stage(stage) for stage in stages],
        glossary=[(name, metric) for name, metric in METRICS.items() if any(s.series(name) for s in stages)],
        environment=next((stage.environment for stage in reversed(stages) if stage.environment), None),
    )
    path = run_dir / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def headline(stages: list[Stage]) -> list[Number]:
    numbers = []
    for name in dict.fromkeys(name for stage in stages for name in stage.scores()):
        curves = [curve for stage in stages if (curve := stage.scores().get(name))]
        way = [curves[0][0][1], *(curve[-1][1] for curve in curves)]
        note = " → ".join(f"{score:.1%}" for score in way)
        numbers.append(Number(f"Held-out accuracy, {name}", f"{way[-1]:.1%}", note))
    rewards = [value for stage in stages for _, value in stage.series("rollout/raw_reward")]
    if rewards:
        numbers.append(Number("Reward of the last step", f"{rewards[-1]:.3g}", f"first step {rewards[0]:.3g}"))
    steps = " + ".join(str(s.done) if s.finished or s.total is None else f"{s.done} of {s.total}" for s in stages)
    numbers.append(Number("Steps", steps, " + ".join(s.name for s in stages) if len(stages) > 1 else ""))
    seconds = [stage.seconds for stage in stages]
    parts = " + ".join(clock(value) for value in seconds) if len(stages) > 1 else ""
    numbers.append(Number("Time", clock(sum(seconds)), parts))
    differences = [v for s in stages for _, v in s.series("train/train_rollout_logprob_abs_diff_max")]
    if differences:
        note = "largest difference of a token's log-prob, all steps"
        numbers.append(Number("Engine against trainer", f"{max(differences):.1e}", note))
    compared = [v for s in stages for _, v in s.series("parity/tokens")]
    if compared:
        differing = [v for s in stages for _, v in s.series("parity/mismatches")]
        note = f"of {sum(compared):,.0f} that were compared, to the last bit"
        numbers.append(Number("Tokens with two log-probs", f"{sum(differing):,.0f}", note))
    mismatches = [v for s in stages for _, v in s.series("refit/checksum_mismatches")]
    if mismatches:
        numbers.append(Number("Refit checksum mismatches", f"{sum(mismatches):.0f}", f"in {len(mismatches)} refits"))
    return numbers


def _stage(stage: Stage) -> dict[str, Any]:
    drawn = []
    for title, (metrics, log) in CURVES.items():
        lines: dict[str, Series] = {label: stage.series(name) for label, name in metrics.items()}
        lines = {label: series for label, series in lines.items() if series}
        if lines:
            first = next(iter(metrics.values()))
            svg = plots.curves(lines, unit=describe(first).unit, log=log, salt=f"{stage.name}-{title}")
            drawn.append(Plot(title, describe(first).meaning, Markup(svg)))
    return {
        "name": stage.name,
        "mode": stage.mode,
        "done": stage.done,
        "total": stage.total,
        "finished": stage.finished,
        "seconds": clock(stage.seconds),
        "startup": clock(stage.startup) if stage.startup else "",
        "plots": drawn,
        "phases": Markup(plots.phases(stage)) if stage.timed_steps() else None,
        "pairs": _pairs(stage.transcripts),
        "settings": stage.settings_text,
    }


def _pairs(transcripts: list[Transcript]) -> list[Pair]:
    """In the order of the first evaluation."""
    first: dict[tuple[str, str], Transcript] = {}
    last: dict[tuple[str, str], Transcript] = {}
    for transcript in transcripts:
        key = transcript.source, transcript.uid
        first.setdefault(key, transcript)
        last[key] = transcript
    return [Pair(first[key], last[key]) for key in first]


def _template() -> Any:
    loader = PackageLoader("miles_spmd.telemetry", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")
