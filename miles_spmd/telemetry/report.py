"""The report of a run: what it left in its folder as one JSON document, and the static page that shows it.

The page (``report_page.html``) contains its styles and its script and loads nothing else. Its function ``show`` renders
the document that :func:`report_data` returns, whether that is embedded in the page or comes from elsewhere.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from miles_spmd.telemetry.environment import ENVIRONMENT_FILE, Environment
from miles_spmd.telemetry.json_lines import Lines
from miles_spmd.telemetry.metrics import PHASES, describe, is_fraction, is_score
from miles_spmd.telemetry.stragglers import STRAGGLERS_FILE, Stragglers, read_stragglers
from miles_spmd.telemetry.texts import clock
from miles_spmd.telemetry.trackers import by_step, missing_steps
from miles_spmd.telemetry.transcripts import ROLLOUTS_FILE, TRANSCRIPTS_FILE, Rollout, Transcript
from miles_spmd.types.files import write_whole
from miles_spmd.types.printable import printable
from miles_spmd.types.run_files import CONFIG_FILE, METRICS_FILE

REPORT_FILE = "report.html"
PAGE = Path(__file__).with_name("report_page.html")
DATA_PLACE = "__RUN_DATA__"
MAX_TEXT = 100_000  # characters of one text on the page
MAX_ROLLOUTS = 8  # steps whose best and worst responses are shown


@dataclass(frozen=True)
class Curves:
    """Metrics that share a chart: label -> metric."""

    title: str
    lines: dict[str, str]
    log: bool = False


CURVES = (
    Curves("Reward", {"reward": "rollout/raw_reward"}),
    Curves("Spread of rewards", {"standard deviation": "rollout/reward_std"}),
    Curves("Loss", {"loss": "train/loss"}),
    Curves("KL to the reference", {"kl": "train/kl_loss"}),
    Curves("KL to the teacher", {"kl": "rollout/opd_reverse_kl"}),
    Curves("Critic loss", {"loss": "train/critic_loss"}),
    Curves("Explained variance of the critic", {"explained": "rollout/value_explained_variance"}),
    Curves("Preference accuracy", {"accuracy": "train/reward_accuracy"}),
    Curves("Policy change within a step", {"ppo kl": "train/ppo_kl"}),
    Curves("Response length", {"mean": "rollout/response_len", "longest": "rollout/response_len_max"}),
    Curves("Entropy", {"entropy": "train/entropy_loss"}),
    Curves("Gradient norm", {"norm": "train/grad_norm", "critic": "train/critic_grad_norm"}),
    Curves("Learning rate", {"learning rate": "train/lr", "critic": "train/critic_lr"}),
    Curves("Clipped tokens", {"clipped": "train/pg_clipfrac"}),
    Curves("Groups without a gradient", {"zero std": "rollout/zero_std_ratio"}),
    Curves("Truncated responses", {"truncated": "rollout/truncated_ratio"}),
    Curves(
        "Log-prob difference of engine and trainer",
        {"mean": "train/train_rollout_logprob_abs_diff", "largest": "train/train_rollout_logprob_abs_diff_max"},
        log=True,
    ),
    Curves("KL between engine and trainer", {"kl": "train/train_rollout_kl"}),
    Curves("Throughput", {"tokens": "perf/tokens_per_gpu_per_second"}),
    Curves("Slowest rank", {name: f"perf/{name}_slowest" for name in ("rollout", "log_probs", "train")}),
    Curves("Peak memory", {name: f"memory/{name}" for name in ("rollout", "log_probs", "train", "refit")}),
)


@dataclass(frozen=True)
class Number:
    """A headline number."""

    label: str
    value: str
    note: str = ""


def write_report(run_dir: Path, warn: Callable[[str], None] = lambda problem: None) -> Path:
    """Write ``report.html`` into ``run_dir`` and return its path. ``warn`` gets what is wrong with the run's files.

    Raises FileNotFoundError where ``run_dir`` contains no run.
    """
    path, data = run_dir / REPORT_FILE, report_data(run_dir)
    for problem in data["problems"]:
        warn(problem)
    write_whole(path, make_page(data).encode())
    return path


def make_page(data: dict[str, Any] | None) -> str:
    """Return the page as HTML with ``data``, the document of :func:`report_data`, in it; None leaves it empty."""
    # Without "<" no text of a model can end the script element that contains the document.
    document = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace(DATA_PLACE, document)


def report_data(run_dir: Path) -> dict[str, Any]:
    """Return everything that the page shows of the run in ``run_dir``, or of its stages, as plain JSON values.

    Raises FileNotFoundError where ``run_dir`` contains no run.
    """
    stages = read_stages(run_dir)
    metrics = sorted({name for stage in stages for name in stage.series})
    data = {
        "title": run_dir.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "finished": all(stage.finished for stage in stages),
        "evaluation": all(stage.evaluates for stage in stages),
        "problems": [problem for stage in stages for problem in stage.problems],
        "numbers": headline(stages),
        "stages": [_stage(stage) for stage in stages],
        "scores": [name for name in metrics if is_score(name)],
        "fractions": [name for name in metrics if is_score(name) and _is_accuracy(stages, name)],
        "curves": CURVES,
        "phases": PHASES,
        "metrics": {name: describe(name) for name in metrics},
        "environment": next((stage.environment for stage in reversed(stages) if stage.environment), None),
    }
    return _printable(msgspec.to_builtins(data))


def _printable(value: Any) -> Any:
    """Return a document without texts that a page should not show as they are: models and rewards wrote some."""
    match value:
        case str():
            return printable(value, MAX_TEXT)
        case dict():
            return {printable(name, MAX_TEXT): _printable(entry) for name, entry in value.items()}
        case list() | tuple():
            return [_printable(entry) for entry in value]
    return value


def _is_accuracy(stages: list[Stage], metric: str) -> bool:
    return is_fraction(value for stage in stages for value in stage.values(metric))


def headline(stages: list[Stage]) -> list[Number]:
    """Return the numbers for the top of the page, only those that the run has."""

    def values(metric: str) -> list[float]:
        return [value for stage in stages for value in stage.values(metric)]

    numbers = []

    def add(label: str, value: str, note: str = "") -> None:
        numbers.append(Number(label, value, note))

    for name in dict.fromkeys(name for stage in stages for name in stage.scores()):
        curves = [curve for stage in stages if (curve := stage.scores().get(name))]
        ends = [curves[0][0][1], *(curve[-1][1] for curve in curves)]
        what, form = ("accuracy", ".1%") if _is_accuracy(stages, f"eval/{name}") else ("score", ".3g")
        note = " → ".join(f"{score:{form}}" for score in ends) if curves[-1][0] != curves[0][-1] else ""
        add(f"Held-out {what}, {name}", f"{ends[-1]:{form}}", note)
    if rewards := values("rollout/raw_reward"):
        add("Reward of the last step", f"{rewards[-1]:.3g}", f"first step {rewards[0]:.3g}")
    trained = [stage for stage in stages if not stage.evaluates]
    steps = " + ".join(str(s.done) if s.finished or s.total is None else f"{s.done} of {s.total}" for s in trained)
    seconds = [sum(stage.values("perf/step_time")) for stage in stages]
    several = len(stages) > 1
    if trained:
        add("Steps", steps, " + ".join(s.name for s in trained) if several else "")
    add("Time", clock(sum(seconds)), " + ".join(map(clock, seconds)) if several else "")
    if differences := values("train/train_rollout_logprob_abs_diff_max"):
        add("Engine against trainer", f"{max(differences):.1e}", "max abs diff of a token's log-prob, all steps")
    if compared := values("parity/tokens"):
        mismatches = f"{sum(values('parity/mismatches')):,.0f}"
        add("Tokens with two log-probs", mismatches, f"of {sum(compared):,.0f} compared bitwise")
    if mismatched := values("refit/checksum_mismatches"):
        add("Refit checksum mismatches", f"{sum(mismatched):.0f}", f"in {len(mismatched)} refits")
    return numbers


def _stage(stage: Stage) -> dict[str, Any]:
    seconds, startup = (sum(stage.values(f"perf/{name}_time")) for name in ("step", "start"))
    steps = f"{stage.done} steps" if stage.total is None else f"{stage.done} of {stage.total} steps"
    parts = [
        stage.mode and f"mode {stage.mode}",
        f"evaluation after {stage.done} steps" if stage.evaluates else steps,
        clock(seconds) + (f", {clock(startup)} of it to start" if startup else ""),
        "" if stage.finished else "not finished",
    ]
    last = max(len(stage.rollouts) - 1, 0)
    spread = sorted({round(i * last / (MAX_ROLLOUTS - 1)) for i in range(MAX_ROLLOUTS)}) if stage.rollouts else []
    return {
        "name": stage.name,
        "evaluation": stage.evaluates,
        "summary": " · ".join(part for part in parts if part),
        "series": stage.series,
        "transcripts": _first_and_last(stage.transcripts),
        "rollouts": [stage.rollouts[i] for i in spread],
        "stragglers": stage.stragglers,
        "config": stage.config,
    }


def _first_and_last(transcripts: list[Transcript]) -> list[list[Transcript]]:
    """Return for each prompt and role the transcripts of the first and the last evaluation: one where these are the
    same."""
    by_prompt: dict[tuple[str, str, str], list[Transcript]] = {}
    for transcript in transcripts:
        by_prompt.setdefault((transcript.source, transcript.uid, transcript.role), []).append(transcript)
    return [[own[0], own[-1]] if own[0].step != own[-1].step else [own[-1]] for own in by_prompt.values()]


# --- what runs left: finished, stopped or still going ----------------------------------------------------------------

Series = list[tuple[int, float]]  # (steps done, value)


@dataclass(frozen=True)
class Stage:
    """One run: a supervised or a reinforcement-learning stage of a larger one, or the only one."""

    name: str
    mode: str  # run.mode, "" without config.toml
    done: int  # steps
    total: int | None  # steps that config.toml asks for, None without config.toml
    started: float  # Unix seconds
    series: dict[str, Series]  # of each metric, steps ascending
    transcripts: list[Transcript]
    rollouts: list[Rollout]  # one per step, steps ascending
    config: str  # the text of config.toml, "" without one
    environment: Environment | None
    stragglers: Stragglers | None
    problems: list[str]  # files that cannot be read, or of which a part is missing

    @property
    def evaluates(self) -> bool:
        """Whether this is a run of the verb eval."""
        return self.environment is not None and self.environment.task == "eval"

    @property
    def finished(self) -> bool:
        return bool(self.scores()) if self.evaluates else self.total is not None and self.done >= self.total

    def values(self, metric: str) -> list[float]:
        """Return the values of ``metric`` over the steps, an empty list where the run has not written it."""
        return [value for _, value in self.series.get(metric, [])]

    def scores(self) -> dict[str, Series]:
        """Return the score of each evaluation set over the steps, by the set's name."""
        return {name.removeprefix("eval/"): series for name, series in self.series.items() if is_score(name)}


def read_stages(run_dir: Path) -> list[Stage]:
    """Return the run in ``run_dir`` itself and those in the folders directly in it, in the order in which they started.

    Raises FileNotFoundError where there is none.
    """
    folders = [folder for folder in (run_dir, *sorted(run_dir.glob("*/"))) if (folder / METRICS_FILE).is_file()]
    if not folders:
        raise FileNotFoundError(f"{run_dir} contains no run: no {METRICS_FILE} in it or in a folder in it")
    return sorted(map(_read_stage, folders), key=lambda stage: stage.started)


def _read_stage(folder: Path) -> Stage:
    rows = Lines(folder / METRICS_FILE, dict[str, float | None])
    transcripts, rollouts = Lines(folder / TRANSCRIPTS_FILE, Transcript), Lines(folder / ROLLOUTS_FILE, Rollout)
    steps = by_step(rows.values)
    problems = [rows.problem, missing_steps(folder / METRICS_FILE, steps), transcripts.problem, rollouts.problem]
    series: dict[str, Series] = {}
    for step, values in steps.items():
        for name, value in values.items():
            series.setdefault(name, []).append((step, value))
    times = [time for _, time in series.pop("time", [])]
    config, environment = "", None
    run: dict[str, Any] = {}
    try:
        config = (folder / CONFIG_FILE).read_text(errors="backslashreplace")
        run = tomllib.loads(config).get("run", {})
    except FileNotFoundError:
        pass
    except (OSError, tomllib.TOMLDecodeError) as error:  # a killed run has left half of it
        problems.append(f"{folder / CONFIG_FILE}: cannot be read: {error}")
    try:
        environment = msgspec.json.decode((folder / ENVIRONMENT_FILE).read_bytes(), type=Environment)
    except FileNotFoundError:
        pass
    except (OSError, msgspec.DecodeError) as error:
        problems.append(f"{folder / ENVIRONMENT_FILE}: cannot be read: {error}")
    stragglers = None
    try:
        stragglers = read_stragglers(folder)
    except (OSError, msgspec.DecodeError) as error:
        problems.append(f"{folder / STRAGGLERS_FILE}: cannot be read: {error}")
    return Stage(
        name=folder.resolve().name,
        mode=run.get("mode", ""),
        done=max(steps, default=0),
        total=run.get("num_rollout"),
        started=min(times, default=0.0),
        series=series,
        transcripts=transcripts.values,
        rollouts=[rollout for _, rollout in sorted({r.step: r for r in rollouts.values}.items())],
        config=config,
        environment=environment,
        stragglers=stragglers,
        problems=list(filter(None, problems)),
    )
