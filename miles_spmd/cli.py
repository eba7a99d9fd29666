"""The verbs. Everything that takes time to import is imported by the verb that needs it."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from miles_spmd.config.schema import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement-learning post-training of language models on Megatron-core and in-process SGLang.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure this machine.")
app.add_typer(bench, name="bench")

Recipe = Annotated[Path, typer.Argument(help="TOML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value: rollout.rollout_batch_size=8, rollout_batch_size=8, megatron.lr=1e-5, ..."),
]
Processes = Annotated[
    int | None, typer.Option("--nproc-per-node", min=1, help="Ranks to start here; default: one per GPU, or 1.")
]
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
        _fail(f"{checkpoint} is no checkpoint of a run: there is no {recipe}")
    fixed = [f"checkpoint.load={checkpoint}", f"checkpoint.export_dir={out}", "sglang.tp_size=1"]
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
        _fail(str(error))


@app.command()
def doctor() -> None:
    """Say what this machine can run, what not, and why. Succeeds if at least the CPU path works."""
    from miles_spmd.doctor import examine, render

    sections, works = examine()
    typer.echo(render(sections, works))
    raise typer.Exit(0 if works else 1)


@bench.command("quickstart")
def bench_quickstart(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to run with.")] = 2,
    steps: Annotated[int, typer.Option(min=3, help="Steps to take the median of.")] = 15,
    trl: Annotated[Path | None, typer.Option(help="A Python that has TRL, to measure it beside ours.")] = None,
) -> None:
    """A GRPO step's time by phase on small models."""
    from rich.console import Console

    from miles_spmd.bench.quickstart import bench_quickstart, show

    show(bench_quickstart(ranks, steps, trl), Console())


@bench.command("algorithms")
def bench_algorithms(
    recipes: Annotated[list[Path] | None, typer.Argument(help="Default: configs/algorithms/*.toml but sft.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe, seeds 1, 2, ...")] = 3,
    samples: Annotated[
        int, typer.Option(min=1, help="Trained samples of a run; preference recipes have theirs.")
    ] = 20_480,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one per core.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """What each algorithm learns of the quickstart's task, with the same budget. Wants a finished quickstart."""
    from miles_spmd.bench.algorithms import bench_algorithms

    try:
        bench_algorithms(recipes, seeds, samples, jobs or len(os.sched_getaffinity(0)), out)
    except FileNotFoundError as error:
        _fail(str(error))


@bench.command("loss")
def bench_loss(
    vocabulary: Annotated[int, typer.Option(min=4)] = 151_936,
    tokens: Annotated[int, typer.Option(min=2, help="Scored tokens of a micro-batch.")] = 16_384,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the hidden states.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of hidden states and output layer: float32 or bfloat16.")] = "float32",
    top_p: Annotated[float, typer.Option(help="As the rollout cuts its distribution.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="The same.")] = -1,
) -> None:
    """Memory and time of log-probs, entropy and their gradient, from hidden states on."""
    from rich.console import Console

    from miles_spmd.bench.loss import Shape, bench_loss, show

    shape = Shape(vocabulary, tokens, hidden, dtype, top_p, top_k)
    show(shape, bench_loss(shape), Console())


Model = Annotated[str, typer.Option("--model", help="Checkpoint folder, or random:SHAPE.")]
Out = Annotated[Path | None, typer.Option(help="JSON file for the result.")]
Repeats = Annotated[int, typer.Option(min=1, help="Repetitions to take the median of.")]


@bench.command("refit")
def bench_refit(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    repeats: Repeats = 10,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """From trainer to engine: each part of a refit, and how long the engine stands still."""
    _measure("refit", model, overrides, nproc_per_node, out, repeats=repeats)


@bench.command("sleep")
def bench_sleep(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    cycles: Annotated[int, typer.Option(min=2, help="Times to sleep and wake.")] = 50,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Release and resume of the engine's memory, and whether memory leaks."""
    _measure("sleep", model, overrides, nproc_per_node, out, cycles=cycles)


@bench.command("rollout")
def bench_rollout(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    prompts: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 256,
    answer_tokens: Annotated[int, typer.Option(min=1)] = 512,
    peer: Annotated[bool, typer.Option(help="Run plain sglang.Engine, too.")] = True,
    repeats: Repeats = 3,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Generation, beside plain sglang.Engine."""
    sizes = {"prompts": prompts, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
    _measure("rollout", model, overrides, nproc_per_node, out, **sizes, repeats=repeats, peer=peer)


@bench.command("train")
def bench_train(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    packing: Annotated[list[str], typer.Option(help="SEQUENCESxTOKENS of a micro-batch.")] = ["1x4096", "4x4096"],  # noqa: B006
    micro_batches: Annotated[int, typer.Option(min=1, help="Of one optimizer step.")] = 4,
    repeats: Repeats = 3,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Optimizer steps and log-probs: tokens per second, utilisation, peak memory."""
    packings = [tuple(map(int, word.split("x"))) for word in packing]
    options = {"packings": packings, "micro_batches": micro_batches, "repeats": repeats}
    _measure("train", model, overrides, nproc_per_node, out, **options)


@bench.command("step")
def bench_step(
    overrides: Overrides = None,
    model: Model = "random:qwen2.5-1.5b",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step.")] = 32,
    samples: Annotated[int, typer.Option(min=2, help="Answers to each.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    answer_tokens: Annotated[int, typer.Option(min=1)] = 512,
    repeats: Repeats = 5,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """A GRPO step by phase, as `train` does it."""
    from miles_spmd.bench.result import make_result
    from miles_spmd.bench.run import publish
    from miles_spmd.bench.step import bench_step

    ranks = nproc_per_node or _default_processes()
    sizes = {"prompts": prompts, "samples": samples, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
    rows = bench_step(model, ranks, overrides or [], **sizes, steps=repeats)
    publish(make_result("step", model, ranks, {"overrides": overrides or []}, rows), out)


def main() -> None:
    app(prog_name="miles-spmd")


# --- starting --------------------------------------------------------------------------------------------------------


def _start(task: str, recipe: Path, overrides: list[str], nproc: int | None, dry_run: bool = False) -> None:
    """Do ``task`` as the rank that a launcher made this process, or launch ranks that do."""
    is_rank = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if is_rank:
        _prepare_device()
    world_size = int(os.environ["WORLD_SIZE"]) if is_rank else nproc or _default_processes()
    config = _load(recipe, overrides, world_size, check_files=task != "export")
    if dry_run:
        _plan(config, world_size, None)
    elif is_rank:
        _be_a_rank(config, task)
    else:
        _launch(world_size)


def _measure(
    name: str, model: str, overrides: list[str] | None, nproc: int | None, out: Path | None, **options: Any
) -> None:
    """Do a measurement as a rank, or launch ranks that do."""
    is_rank = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if is_rank:
        _prepare_device()
    world_size = int(os.environ["WORLD_SIZE"]) if is_rank else nproc or _default_processes()
    from miles_spmd.bench.run import bench_config, run_bench
    from miles_spmd.config.load import ConfigError

    try:
        config = bench_config(model, overrides or [], world_size)
    except ConfigError as error:
        _fail(str(error), code=2)
    if not is_rank:
        _launch(world_size)
    run_bench(name, model, config, options, out)
    sys.stdout.flush()
    os._exit(0)  # an interpreter that ends frees the engine's memory, at which torch_memory_saver fails the process


def _be_a_rank(config: Config, task: str) -> NoReturn:
    from miles_spmd.config.load import dump_config
    from miles_spmd.telemetry.environment import write_environment
    from miles_spmd.worker.main import main as worker

    if task == "eval":  # beside the training run of the same recipe, not in its folder
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-eval"})})
    if os.environ["RANK"] == "0":
        _print_doubts(config)
        if task != "export":
            config.run_dir.mkdir(parents=True, exist_ok=True)
            (config.run_dir / "config.toml").write_text(dump_config(config))
            write_environment(config.run_dir)
    status = worker(config, task)
    if status == 0 and os.environ["RANK"] == "0" and task != "export":
        from miles_spmd.telemetry.report import write_report  # now: loading matplotlib takes as long as a step

        try:
            write_report(config.run_dir)
        except Exception as error:  # of a drawing: the run itself is complete
            typer.echo(
                f"miles-spmd: note: no report: {error}; `miles-spmd report {config.run_dir}` tries again", err=True
            )
    raise SystemExit(status)


def _prepare_device() -> None:
    from miles_spmd.platform.cuda import preload_memory_saver
    from miles_spmd.telemetry.environment import gpus

    if gpus():
        preload_memory_saver()


def _launch(world_size: int) -> NoReturn:
    """torchrun, in this process: its ranks run this same command. When one fails they have said why, so torchrun's own
    account of it is left out."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(["--standalone", f"--nproc-per-node={world_size}", "-m", "miles_spmd", *sys.argv[1:]])
    except ChildFailedError as error:
        code = max(failure.exitcode for failure in error.failures.values())
        raise SystemExit(code if code > 0 else 1) from None
    except SignalException as signal:
        raise SystemExit(128 + signal.sigval) from None
    raise SystemExit(0)


def _default_processes() -> int:
    from miles_spmd.telemetry.environment import gpus

    return max(1, len(gpus()))


def _smallest_world(recipe: Path, overrides: list[str]) -> int:
    """The fewest ranks that hold the whole model."""
    from miles_spmd.config.checks import settings

    s = settings(_load(recipe, overrides, None, check_files=False))
    tensor, pipeline = s["tensor_model_parallel_size"], s["pipeline_model_parallel_size"]
    expert = (s["expert_tensor_parallel_size"] or tensor) * s["expert_model_parallel_size"]
    return pipeline * math.lcm(tensor * s["context_parallel_size"], expert)


# --- loading and printing --------------------------------------------------------------------------------------------


def _load(recipe: Path, overrides: list[str], world_size: int | None, *, check_files: bool) -> Config:
    from miles_spmd.config.load import ConfigError, load_config

    try:
        return load_config(recipe, overrides, world_size=world_size, check_files=check_files)
    except ConfigError as error:
        _fail(str(error), code=2)


def _print_doubts(config: Config) -> None:
    from miles_spmd.config.checks import doubts

    for doubt in doubts(config):
        typer.echo(f"miles-spmd: note: {doubt}", err=True)


def _plan(config: Config, world_size: int, device_memory: float | None) -> None:
    from miles_spmd.planning.plan import describe_plan
    from miles_spmd.telemetry.environment import gpus

    _print_doubts(config)
    device_memory = device_memory or min((gpu.memory_gib for gpu in gpus()), default=None)
    try:
        typer.echo(describe_plan(config, world_size, device_memory))
    except (FileNotFoundError, ValueError) as error:
        _fail(str(error))


def _fail(message: str, code: int = 1) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"miles-spmd: {message}", err=True)
    sys.exit(code)
