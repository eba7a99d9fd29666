"""The verbs. Everything that takes time to import is imported by the verb that needs it."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TextIO

import typer

from miles_spmd import launcher
from miles_spmd.launcher import Overrides, Processes

if TYPE_CHECKING:
    from miles_spmd.config import Config
    from miles_spmd.ledger.compare import Comparison
    from miles_spmd.protocol.order import Replay

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement-learning post-training of language models on Megatron-core and in-process SGLang.",
)
ledger = typer.Typer(no_args_is_help=True, help="What a run has recorded of every step.")
app.add_typer(ledger, name="ledger")

Recipe = Annotated[Path, typer.Argument(help="TOML file, see configs/.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, as `plan` does, and stop.")]


@app.command()
def train(
    config: Recipe, overrides: Overrides = None, nproc_per_node: Processes = None, dry_run: DryRun = False
) -> None:
    """Train. Starts its ranks itself, or is started as a rank by torchrun or srun."""
    _start("train", config, overrides or [], nproc_per_node, dry_run)


@app.command("eval")
def evaluate(
    config: Recipe, overrides: Overrides = None, nproc_per_node: Processes = None, dry_run: DryRun = False
) -> None:
    """Score the checkpoint on the evaluation sets, without training."""
    _start("eval", config, [*(overrides or []), "eval_interval=1"], nproc_per_node, dry_run)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's checkpoint folder, checkpoints/step_000100.")],
    out: Annotated[Path, typer.Argument(help="Where the Hugging Face checkpoint goes.")],
    overrides: Overrides = None,
    nproc_per_node: Processes = None,
) -> None:
    """Turn a checkpoint of a run into a Hugging Face checkpoint. The layout may differ from the run's."""
    recipe = checkpoint.absolute().parents[1] / "config.toml"
    if not recipe.is_file():
        launcher.fail(f"{checkpoint} is no checkpoint of a run: there is no {recipe}")
    no_engines = ["sglang.tp_size=1", "rollout.rollout_num_gpus=0", "determinism.parity=off"]
    fixed = [f"checkpoint.load={checkpoint}", f"checkpoint.export_dir={out}", *no_engines]
    _start("export", recipe, [*(overrides or []), *fixed], nproc_per_node or _smallest_world(recipe, overrides or []))


@app.command()
def plan(
    config: Recipe,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    device_memory: Annotated[float | None, typer.Option(help="GiB of one GPU; default: as here.")] = None,
) -> None:
    """Print ranks, groups, batch schedule and a memory estimate; only the checkpoint's config.json is read."""
    _plan(_load(config, overrides or [], world_size, check_files=False), world_size, device_memory)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run, or of several stages of one.")]) -> None:
    """Write report.html into a run's folder, finished or not."""
    from miles_spmd.telemetry.report import write_report

    try:
        typer.echo(write_report(run_dir))
    except FileNotFoundError as error:
        launcher.fail(str(error))


@ledger.command("verify")
def verify_ledger(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Recompute the hash chain, and the digests of the data that were kept. Names the first entry that is broken."""
    from miles_spmd.ledger.chain import LedgerError
    from miles_spmd.ledger.record import verify

    try:
        record = verify(run_dir)
    except LedgerError as error:
        launcher.fail(str(error))
    typer.echo(f"{run_dir}: {record.entries} entries hold together, {len(record.steps)} of them steps")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Folder of a run.")],
    b: Annotated[Path, typer.Argument(help="Folder of another.")],
) -> None:
    """Name the first difference between what two runs computed. Status 0: there is none, 1: there is one, 2: error."""
    from miles_spmd.ledger.chain import LedgerError
    from miles_spmd.ledger.compare import compare
    from miles_spmd.ledger.record import read_record

    try:
        raise typer.Exit(_say(compare(read_record(a), read_record(b))))
    except LedgerError as error:
        launcher.fail(str(error), code=2)


@app.command()
def replay(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run; wants the data and models that it had.")],
    step: Annotated[int, typer.Option("--step", min=0, help="The last step to do again.")],
    phase: Annotated[
        Literal["rollout", "train"] | None,
        typer.Option(
            help="rollout: of that step only the answers. train: nothing is generated, answers are the run's."
        ),
    ] = None,
    nproc_per_node: Processes = None,
) -> None:
    """Do steps again, from the nearest checkpoint on, and compare them with the ledger bit for bit. The replay has a
    folder beside the run's. Status as of `diff`."""
    from miles_spmd.controller.loops.replay import plan
    from miles_spmd.ledger.chain import LedgerError
    from miles_spmd.ledger.compare import compare
    from miles_spmd.ledger.record import read_record

    try:
        wanted, overrides = plan(run_dir, step, phase)
        of_run = read_record(run_dir)
    except (LedgerError, RuntimeError) as error:
        launcher.fail(str(error), code=2)
    is_rank, world_size = launcher.ranks(nproc_per_node or of_run.context(wanted.first).environment["ranks"])
    config = _load(run_dir / "config.toml", overrides, world_size, check_files=True)
    if not is_rank:
        launcher.launch(world_size)
    with os.fdopen(os.dup(1), "w") as terminal:  # a rank's own output goes to its log
        status = _run_as_rank(config, "replay", wanted)
        if status == 0 and os.environ["RANK"] == "0":
            status = _say(compare(of_run, read_record(config.run_dir), wanted.steps, phase), terminal)
    raise SystemExit(status)


@app.command()
def bisect(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run; wants the data and models that it had.")],
    step: Annotated[int, typer.Option("--step", min=0, help="The step in which engine and trainer differ.")],
    nproc_per_node: Processes = None,
) -> None:
    """Name the first layer and operator whose outputs differ between engine and trainer, for the first token of a step
    whose log-probs do. Does the steps before it again, from the nearest checkpoint on, in a folder beside the run's."""
    from miles_spmd.controller.loops.replay import plan_bisection

    wanted, overrides = plan_bisection(run_dir, step)
    is_rank, world_size = launcher.ranks(nproc_per_node)
    config = _load(run_dir / "config.toml", overrides, world_size, check_files=True)
    if not is_rank:
        launcher.launch(world_size)
    raise SystemExit(_run_as_rank(config, "bisect", wanted))


def _say(comparison: Comparison, terminal: TextIO | None = None) -> int:
    """The exit status of what was found."""
    for condition in comparison.conditions:
        typer.echo(f"differs: {condition}", terminal)
    for condition in comparison.layout:
        typer.echo(f"layout: {condition}", terminal)
    found = f"first difference: {comparison.difference}"
    if comparison.equal:
        found = "no difference, except for the layout" if comparison.layout else "no difference"
    typer.echo(f"steps {comparison.steps[0]} to {comparison.steps[-1]}: {found}", terminal)
    return 0 if comparison.equal else 1


@app.command()
def settings(
    word: Annotated[str, typer.Argument(help="Print only settings that contain it.", show_default=False)] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/settings.md.")] = False,
) -> None:
    """Print every setting with its type, default and meaning."""
    from miles_spmd.config.describe import describe_settings, settings_page

    text = settings_page() if markdown else describe_settings(word)
    if not text:
        launcher.fail(f"no setting contains {word!r}")
    typer.echo(text, nl=not markdown)


@app.command()
def doctor() -> None:
    """Say what this machine can run, what not, and why. Succeeds if at least the CPU path works."""
    from miles_spmd.doctor import examine, render

    sections, works = examine()
    typer.echo(render(sections, works))
    raise typer.Exit(0 if works else 1)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure this machine; `miles-spmd bench --help` lists what."""
    measure = importlib.import_module("miles_spmd.bench.cli").app  # beside the product: by name, so only when asked for
    measure(context.args, prog_name="miles-spmd bench")


def main() -> None:
    app(prog_name="miles-spmd")


# --- starting --------------------------------------------------------------------------------------------------------


def _start(task: str, recipe: Path, overrides: list[str], nproc: int | None, dry_run: bool = False) -> None:
    """Do ``task`` as the rank that a launcher made this process, or launch ranks that do."""
    is_rank, world_size = launcher.ranks(nproc)
    config = _load(recipe, overrides, world_size, check_files=task != "export")
    if dry_run:
        _plan(config, world_size, None, here=True)
    elif is_rank:
        _be_a_rank(config, task)
    else:
        launcher.launch(world_size)


def _be_a_rank(config: Config, task: str) -> NoReturn:
    if task == "eval":  # beside the training run of the same recipe, not in its folder
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-eval"})})
    status = _run_as_rank(config, task)
    if status == 0 and os.environ["RANK"] == "0" and task != "export":
        from miles_spmd.telemetry.report import write_report  # now: loading matplotlib takes as long as a step

        try:
            write_report(config.run_dir)
        except Exception as error:  # of a drawing: the run itself is complete
            typer.echo(
                f"miles-spmd: note: no report: {error}; `miles-spmd report {config.run_dir}` tries again", err=True
            )
    raise SystemExit(status)


def _run_as_rank(config: Config, task: str, replay: Replay | None = None) -> int:
    """The exit status."""
    from miles_spmd.config.load import dump_config
    from miles_spmd.telemetry.environment import gpus, write_environment
    from miles_spmd.worker.main import main as worker

    config, notes = _decide(config, {gpu.capability for gpu in gpus()})
    if os.environ["RANK"] == "0":
        _print_notes(notes)
        if task != "export":
            config.run_dir.mkdir(parents=True, exist_ok=True)
            (config.run_dir / "config.toml").write_text(dump_config(config))
            write_environment(config.run_dir)
    return worker(config, task, replay)


def _smallest_world(recipe: Path, overrides: list[str]) -> int:
    """The fewest ranks that hold the whole model."""
    from miles_spmd.config import checks

    s = checks.settings(_load(recipe, overrides, None, check_files=False))
    tensor, pipeline = s["tensor_model_parallel_size"], s["pipeline_model_parallel_size"]
    expert = (s["expert_tensor_parallel_size"] or tensor) * s["expert_model_parallel_size"]
    return pipeline * math.lcm(tensor * s["context_parallel_size"], expert)


# --- loading and printing --------------------------------------------------------------------------------------------


def _load(recipe: Path, overrides: list[str], world_size: int | None, *, check_files: bool) -> Config:
    from miles_spmd.config.load import ConfigError, load_config

    try:
        return load_config(recipe, overrides, world_size=world_size, check_files=check_files)
    except ConfigError as error:
        launcher.fail(str(error), code=2)


def _decide(config: Config, capabilities: Collection[str] | None) -> tuple[Config, list[str]]:
    """What "auto" stands for with these GPUs (None: not known), and what a user should be told of the settings."""
    from miles_spmd.config.checks import decide_parity, warnings

    decided, reasons = decide_parity(config, capabilities)
    if config.run.mode != "rl":  # nobody misses it
        reasons = []
    return decided, [*warnings(config), *(f"determinism.parity is off: {reason}" for reason in reasons)]


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        typer.echo(f"miles-spmd: note: {note}", err=True)


def _plan(config: Config, world_size: int, device_memory: float | None, *, here: bool = False) -> None:
    """Of a run on a machine like this one if ``here``, else of one on GPUs that this machine need not have."""
    from miles_spmd.planning.plan import describe_plan
    from miles_spmd.telemetry.environment import gpus

    devices = gpus()
    capabilities = {gpu.capability for gpu in devices}
    config, notes = _decide(config, capabilities if capabilities or here else None)
    _print_notes(notes)
    device_memory = device_memory or min((gpu.memory_gib for gpu in devices), default=None)
    try:
        typer.echo(describe_plan(config, world_size, device_memory))
    except (FileNotFoundError, ValueError) as error:
        launcher.fail(str(error))
