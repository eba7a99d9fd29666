"""The verbs of ``miles-spmd``. A verb imports what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from miles_spmd import launcher
from miles_spmd.launcher import Overrides, Processes
from miles_spmd.types.files import unusable
from miles_spmd.types.printable import MAX_LINE, printable
from miles_spmd.types.run_files import NO_ROWS

if TYPE_CHECKING:
    from miles_spmd.config import Config
    from miles_spmd.ledger.compare import Comparison

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement-learning post-training of language models on Megatron-core and in-process SGLang.",
)
ledger = typer.Typer(no_args_is_help=True, help="Check the ledger, in which a run records every step.")
app.add_typer(ledger, name="ledger")


def _is_usable(path: Path) -> Path:
    if problem := unusable(path):
        raise typer.BadParameter(f"{str(path)!r} {problem}")
    return path


Recipe = Annotated[Path, typer.Argument(help="TOML file, see configs/.", show_default=False, callback=_is_usable)]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False, callback=_is_usable)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan of the run, as `plan` does, and stop.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"miles-spmd {importlib.metadata.version('miles-spmd')}")
        raise typer.Exit


def _is_positive(value: float | None) -> float | None:
    if value is not None and not (0 < value < math.inf):
        raise typer.BadParameter(f"{value} is not a finite number above 0")
    return value


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


# of a run in which nobody trains
ENGINES_ALONE = ["megatron={}", "rollout.rollout_num_gpus=0", "refit.update_weights_interval=1", "export_final=false"]
OPTIONS_OF_OTHERS = {"ignore_unknown_options": True}  # refused as overrides, with our names


@app.command(context_settings=OPTIONS_OF_OTHERS)
def train(
    config: Recipe, overrides: Overrides = None, nproc_per_node: Processes = None, dry_run: DryRun = False
) -> None:
    """Train a model.

    Starts its ranks itself, unless torchrun or srun has started it as a rank.
    """
    _start("train", config, overrides or [], nproc_per_node, dry_run)


@app.command("eval", context_settings=OPTIONS_OF_OTHERS)
def evaluate(
    config: Recipe, overrides: Overrides = None, nproc_per_node: Processes = None, dry_run: DryRun = False
) -> None:
    """Score the checkpoint on the evaluation sets, without training."""
    _start("eval", config, [*(overrides or []), "eval_interval=1", "export_final=false"], nproc_per_node, dry_run)


@app.command(context_settings=OPTIONS_OF_OTHERS)
def generate(
    config: Recipe, overrides: Overrides = None, nproc_per_node: Processes = None, dry_run: DryRun = False
) -> None:
    r"""Generate responses to the prompts, without training.

    Writes the samples of `run.num_rollout` rollouts, with tokens, log-probs and rewards, into responses.jsonl in the
    folder of the run. Builds engines alone: \[megatron] is not read.
    """
    _start("generate", config, [*(overrides or []), *ENGINES_ALONE], nproc_per_node, dry_run)


@app.command(context_settings=OPTIONS_OF_OTHERS)
def serve(
    config: Recipe, overrides: Overrides = None, nproc_per_node: Processes = None, dry_run: DryRun = False
) -> None:
    r"""Serve the model over HTTP, with OpenAI's API.

    Prints the address, and leaves it in the files base_url and api_key in the folder of the run. Serves until SIGTERM.
    Builds engines alone: \[megatron] is not read, and no data.
    """
    alone = [f"data.prompt_data={NO_ROWS}", *ENGINES_ALONE]
    _start("serve", config, [*(overrides or []), *alone], nproc_per_node, dry_run)


@app.command(context_settings=OPTIONS_OF_OTHERS)
def slurm(
    config: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Number of nodes, as slurm.nodes=N.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script, and stop.")] = False,
) -> None:
    r"""Submit a training job to Slurm.

    The job is described by \[slurm]. It is requeued at its time limit and after a preemption, and continues.
    """
    from miles_spmd.slurm import run

    more = [] if nodes is None else [f"slurm.nodes={nodes}"]
    typer.echo(run(config, [*(overrides or []), *more], dry_run=dry_run))


@app.command(context_settings=OPTIONS_OF_OTHERS)
def chaos(
    config: Recipe,
    listed: Annotated[
        str,
        typer.Option(
            "--faults", help="KIND[:PROCESS]@PHASE.STEP,...: kill:rank1@train.3,term@rollout.2,diskfull@save.4."
        ),
    ],
    overrides: Overrides = None,
    nproc_per_node: Processes = None,
) -> None:
    """Check that a run survives on this machine what may happen to it.

    Starts the run as NAME-chaos, lets each of the --faults strike in its phase, continues the run when it has ended,
    and prints what each did to it. Kinds: kill, term, stop, slow, lost, diskfull, corrupt. See
    docs/operations.md.
    """
    from miles_spmd.chaos.rehearsal import run

    raise SystemExit(run(config, overrides or [], listed, nproc_per_node))


@app.command(context_settings=OPTIONS_OF_OTHERS)
def warm(config: Recipe, overrides: Overrides = None, nproc_per_node: Processes = None) -> None:
    """Compile the kernels of a run and keep them, so that its start is quick.

    Builds trainer and engine and does one step with short responses. The kernels stay in the folder that
    `run.kernel_cache` names, for the same versions and GPUs.
    """
    _start("warm", config, [*(overrides or []), "export_final=false"], nproc_per_node)


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint folder of a run, checkpoints/step_000100.", show_default=False, callback=_is_usable
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder for the Hugging Face checkpoint.", show_default=False, callback=_is_usable),
    ],
    overrides: Overrides = None,
) -> None:
    """Convert a checkpoint of a run into a Hugging Face checkpoint.

    Reads its files alone, on any machine, also while the run goes on.
    """
    from miles_spmd.config.checks import settings
    from miles_spmd.config.run import export_errors
    from miles_spmd.controller.checkpoint_export import export_checkpoint
    from miles_spmd.controller.checkpoint_folders import FOLDER, STATE_FILE, ResumeError, newest
    from miles_spmd.controller.run_folder import RunFolderError, check, in_folder, override

    folder = checkpoint.resolve()
    recipe = folder.parent.parent / "config.toml"
    if not (folder / STATE_FILE).is_file():
        found = f"it has no {STATE_FILE}" if folder.is_dir() else "the folder does not exist"
        inner = newest(next((path.parent for path in (folder, folder.parent) if path.name == FOLDER), folder))
        remedy = f"name one of its checkpoints, {inner}" if inner else f"name a folder {FOLDER}/step_... of a run"
        launcher.fail(f"{checkpoint} is not a checkpoint of a run: {found}; {remedy}")
    if folder.parent.name != FOLDER or not recipe.is_file():
        launcher.fail(
            f"{checkpoint} is not in the folder of its run, whose config.toml is needed: name it where the run wrote "
            f"it, {FOLDER}/step_... in the run's folder"
        )
    paths = [override("checkpoint.load", folder), override("checkpoint.export_dir", out)]
    config = launcher.load(
        recipe, [*(overrides or []), *in_folder(recipe.parent), *paths], None, check_files=False, task="export"
    )
    for problem in export_errors(settings(config)):
        launcher.fail(problem, code=2)
    with launcher.failing(RunFolderError, code=2):
        check(config, "export")
    with launcher.failing(ResumeError, ValueError, OSError):
        export_checkpoint(config, folder, out)
    typer.echo(f"export:     {out}")


@app.command(context_settings=OPTIONS_OF_OTHERS)
def plan(
    config: Recipe,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, max=2**20, help="Number of ranks.")] = 1,
    device_memory: Annotated[
        float | None,
        typer.Option(
            help="Memory of a GPU in GiB; default: that of this machine's.", show_default=False, callback=_is_positive
        ),
    ] = None,
) -> None:
    """Print ranks, groups, batch schedule and a memory estimate.

    Also examines what the configuration names. The plan itself needs no more than the checkpoint's config.json.
    """
    from miles_spmd.models import load_family

    try:
        found = launcher.load(config, overrides or [], world_size, check_files=True, elsewhere=True)
    except SystemExit:
        from miles_spmd.config.load import ConfigError, load_config

        with contextlib.suppress(ConfigError, OSError, ValueError):  # a plan needs no more than config.json
            found = load_config(config, overrides or [], world_size=world_size, check_files=False)
            load_family(found.model.hf_checkpoint)
            _print_plan(found, world_size, device_memory, here=False)
        raise
    _print_plan(found, world_size, device_memory, here=False)


@app.command()
def report(
    run_dir: Annotated[
        Path,
        typer.Argument(help="Folder of a run, or of several stages of one.", show_default=False, callback=_is_usable),
    ],
) -> None:
    """Write report.html into the folder of a run, finished or not."""
    from miles_spmd.telemetry.report import write_report

    with launcher.failing(OSError):
        typer.echo(write_report(run_dir, launcher.warn))


@app.command()
def status(
    run_dir: RunFolder, as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False
) -> None:
    """Show how far a run is, how its attempts ended, and what it lost.

    Reads the folder alone, on any machine that sees it; asks Slurm's queue where there is one.
    """
    import msgspec

    from miles_spmd.monitor.status import StatusError, read_status, render

    with launcher.failing(StatusError, OSError, code=2):
        found = read_status(run_dir)
    for problem in found.problems:
        launcher.warn(problem)
    typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else render(found))


@app.command()
def tail(
    run_dir: RunFolder,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Lines of the past to print.")] = 10,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Print what comes, until the run ends.")] = True,
    keep: Annotated[bool, typer.Option("--keep", help="Wait for the next attempt when the run has ended.")] = False,
) -> None:
    """Print the progress of a run as its terminal shows it, and follow it through all its attempts."""
    from miles_spmd.monitor.status import StatusError
    from miles_spmd.monitor.tail import follow as followed

    with contextlib.suppress(KeyboardInterrupt), launcher.failing(StatusError, OSError, code=2):
        for some in followed(run_dir, lines, follows=follow, keeps=keep, warn=launcher.warn):
            for line in some:
                typer.echo(printable(line, MAX_LINE))


@ledger.command("verify")
def verify_ledger(run_dir: RunFolder) -> None:
    """Recompute the hash chain and the digests of the recorded data.

    Names the first broken entry. Exit status 0: all holds, 1: something does not, 2: the ledger is missing.
    """
    from miles_spmd.ledger.chain import FILE, FOLDER, LedgerError, verify

    with launcher.failing(LedgerError, code=1 if (run_dir / FOLDER / FILE).exists() else 2):
        record = verify(run_dir)
    typer.echo(f"{run_dir}: {record.entries} entries hold together, {len(record.steps)} of them steps")


@app.command()
def diff(
    a: RunFolder,
    b: Annotated[Path, typer.Argument(help="Folder of another run.", show_default=False, callback=_is_usable)],
) -> None:
    """Name the first difference between the ledgers of two runs.

    Exit status 0: there is none, 1: there is one, 2: error.
    """
    from miles_spmd.ledger.chain import LedgerError, verify
    from miles_spmd.ledger.compare import compare

    with launcher.failing(LedgerError, code=2):
        raise typer.Exit(_print_comparison(compare(verify(a), verify(b))))


@app.command()
def replay(
    run_dir: RunFolder,
    step: Annotated[int, typer.Option("--step", min=0, help="Last step to replay.")],
    phase: Annotated[
        Literal["rollout", "train"] | None,
        typer.Option(
            help="rollout: of that step only the responses. train: without generation, on the responses of the run.",
            show_default=False,
        ),
    ] = None,
    nproc_per_node: Processes = None,
) -> None:
    """Replay steps from the nearest checkpoint on, and compare them bitwise with the ledger.

    Requires the data and models of the run. Writes into a folder beside the run's. Exit status as of `diff`.
    """
    from miles_spmd.controller.loops.replay import plan
    from miles_spmd.ledger.chain import read_record
    from miles_spmd.ledger.compare import compare
    from miles_spmd.protocol.last_words import speaks

    with launcher.failing(RuntimeError, code=2):  # of which LedgerError is one
        order, overrides = plan(run_dir, step, phase)
        original = read_record(run_dir)
    ranks = nproc_per_node or original.context(order.first).environment["ranks"]
    with os.fdopen(os.dup(1), "w") as terminal:  # a rank's own output goes to its log
        config, status = launcher.start("replay", run_dir / "config.toml", overrides, ranks, order)
        if status == 0 and os.environ["RANK"] == "0":
            speaks()  # by what is printed here, which explains a status of 1
            status = _print_comparison(compare(original, read_record(config.run_dir), order.steps, phase), terminal)
    raise SystemExit(status)


@app.command()
def bisect(
    run_dir: RunFolder,
    step: Annotated[int, typer.Option("--step", min=0, help="Step in which engine and trainer differ.")],
    nproc_per_node: Processes = None,
) -> None:
    """Name the first layer and operator whose outputs differ between engine and trainer.

    Examines the first token of a step whose log-probs differ. Replays the steps before it from the nearest checkpoint
    on, in a folder beside the run's. Requires the data and models of the run.
    """
    from miles_spmd.controller.loops.replay import plan_bisection

    with launcher.failing(RuntimeError, code=2):  # LedgerError, ResumeError
        order, overrides = plan_bisection(run_dir, step)
    _, status = launcher.start("bisect", run_dir / "config.toml", overrides, nproc_per_node, order)
    raise SystemExit(status)


@app.command()
def settings(
    word: Annotated[str, typer.Argument(help="Print only settings that contain it.", show_default=False)] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/settings.md.")] = False,
) -> None:
    """Print every setting with its type, default and meaning."""
    from miles_spmd.config.describe import describe_settings, settings_page

    if markdown and word:
        launcher.fail("--markdown prints the whole page: leave out the word, or the option", code=2)
    text = settings_page() if markdown else describe_settings(word)
    if not text:
        launcher.fail(f"no setting contains {word!r}")
    typer.echo(text, nl=not markdown)


@app.command()
def doctor(
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="Examine all nodes of a Slurm job, of which srun runs this once on each; a folder that they share.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Report what this machine can run, what it cannot, and why.

    Exit status 0 where at least the CPU path works; with --cluster where no node is bad.
    """
    if cluster is not None:
        from miles_spmd.preflight import preflight

        status = preflight(cluster)
        sys.stdout.flush()
        os._exit(status)  # threads that still wait for something must not delay the end
    from miles_spmd.doctor import examine, render

    sections, works = examine()
    typer.echo(render(sections, works))
    raise typer.Exit(0 if works else 1)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure this machine; `miles-spmd bench --help` lists the measurements."""
    measure = importlib.import_module("miles_spmd.bench.cli").app  # by name: bench stands beside the product
    measure(context.args, prog_name="miles-spmd bench")


def main() -> None:
    app(prog_name="miles-spmd")


# --- shared by verbs -------------------------------------------------------------------------------------------------


def _start(task: str, recipe: Path, overrides: list[str], nproc: int | None, dry_run: bool = False) -> None:
    """Run ``task`` in ranks, or only print its plan."""
    if dry_run:
        _, world_size = launcher.ranks_for(recipe, overrides, nproc)
        config = launcher.load(recipe, overrides, world_size, check_files=True, task=task)
        config, _ = launcher.begin(config, task, recipe, rank=None)
        _print_plan(config, world_size, None, here=True)
        return
    _, status = launcher.start(task, recipe, overrides, nproc)
    raise SystemExit(status)


def _print_plan(config: Config, world_size: int, device_memory: float | None, *, here: bool) -> None:
    """Print the plan of a run on a machine like this one if ``here``, else on GPUs that this machine need not have."""
    from miles_spmd.planning.plan import describe_plan
    from miles_spmd.telemetry.environment import gpus

    devices = gpus()
    config = launcher.resolve(config, {gpu.capability for gpu in devices} if devices or here else None)
    device_memory = device_memory or min((gpu.memory_gib for gpu in devices), default=None)
    with launcher.failing(FileNotFoundError, ValueError, code=2):
        typer.echo(describe_plan(config, world_size, device_memory))
    typer.echo(f"Run folder: {config.run_dir.absolute()}")
    if config.resilience.cells > 1:
        typer.echo(f"Cells: {config.resilience.cells}")


def _print_comparison(comparison: Comparison, terminal: TextIO | None = None) -> int:
    """Print the result of a comparison and return the exit status that stands for it."""
    kinds = ("differs", comparison.conditions), ("layout", comparison.layout), ("resumed", comparison.changes)
    for kind, conditions in kinds:
        for condition in conditions:
            typer.echo(printable(f"{kind}: {condition}", MAX_LINE), terminal)
    found = f"first difference: {comparison.difference}"
    if comparison.equal:
        found = "no difference, except for the layout" if comparison.layout else "no difference"
    typer.echo(printable(f"steps {comparison.steps[0]} to {comparison.steps[-1]}: {found}", MAX_LINE), terminal)
    return 0 if comparison.equal else 1
