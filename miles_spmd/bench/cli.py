"""``miles-spmd bench``: one verb for each thing that is measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from miles_spmd import launcher
from miles_spmd.launcher import Overrides, Processes

app = typer.Typer(no_args_is_help=True, help="Measure this machine.")


@app.command("quickstart")
def bench_quickstart(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to run with.")] = 2,
    steps: Annotated[int, typer.Option(min=3, help="Steps to take the median of.")] = 15,
    trl: Annotated[Path | None, typer.Option(help="A Python that has TRL, to measure it beside ours.")] = None,
) -> None:
    """A GRPO step's time by phase on small models."""
    from rich.console import Console

    from miles_spmd.bench.quickstart import bench_quickstart, show

    show(bench_quickstart(ranks, steps, trl), Console())


@app.command("algorithms")
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
        launcher.fail(str(error))


@app.command("loss")
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
Tokens = Annotated[int, typer.Option(min=1)]


@app.command("refit")
def bench_refit(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    repeats: Repeats = 10,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """From trainer to engine: each part of a refit, and how long the engine stands still."""
    _measure("refit", model, overrides, nproc_per_node, out, repeats=repeats)


@app.command("sleep")
def bench_sleep(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    cycles: Annotated[int, typer.Option(min=2, help="Times to sleep and wake.")] = 50,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Release and resume of the engine's memory, and whether memory leaks."""
    _measure("sleep", model, overrides, nproc_per_node, out, cycles=cycles)


@app.command("rollout")
def bench_rollout(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    prompts: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 256,
    prompt_tokens: Tokens = 256,
    answer_tokens: Tokens = 512,
    peer: Annotated[bool, typer.Option(help="Run plain sglang.Engine, too.")] = True,
    repeats: Repeats = 3,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Generation, beside plain sglang.Engine."""
    sizes = {"prompts": prompts, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
    cache = [f"rollout_batch_size={-(-prompts // 2)}", "n_samples_per_prompt=2"]
    cache += [f"rollout_max_prompt_len={prompt_tokens}", f"rollout_max_response_len={answer_tokens}"]
    _measure("rollout", model, cache + (overrides or []), nproc_per_node, out, **sizes, repeats=repeats, peer=peer)


@app.command("train")
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


@app.command("step")
def bench_step(
    overrides: Overrides = None,
    model: Model = "random:qwen2.5-1.5b",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step.")] = 32,
    samples: Annotated[int, typer.Option(min=2, help="Answers to each.")] = 16,
    prompt_tokens: Tokens = 128,
    answer_tokens: Tokens = 512,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before those that count.")] = 2,
    repeats: Repeats = 5,
    determinism: Annotated[
        bool, typer.Option("--determinism", help="What ledger, determinism and bitwise parity cost of it.")
    ] = False,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """A GRPO step by phase, as `train` does it."""
    from miles_spmd.bench.determinism import bench_determinism
    from miles_spmd.bench.result import make_result
    from miles_spmd.bench.run import publish
    from miles_spmd.bench.step import bench_step

    ranks = nproc_per_node or launcher.default_processes()
    sizes = {"prompts": prompts, "samples": samples, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
    measure = bench_determinism if determinism else bench_step
    rows = measure(model=model, ranks=ranks, overrides=overrides or [], **sizes, warm_up=warm_up, steps=repeats)
    publish(make_result("step", model, ranks, {"overrides": overrides or [], **sizes}, rows), out)


def _measure(
    name: str, model: str, overrides: list[str] | None, nproc: int | None, out: Path | None, **options: Any
) -> None:
    """Do a measurement as a rank, or launch ranks that do."""
    is_rank, world_size = launcher.ranks(nproc)
    from miles_spmd.bench.run import bench_config, run_bench
    from miles_spmd.config.load import ConfigError

    try:
        config = bench_config(model, overrides or [], world_size)
    except ConfigError as error:
        launcher.fail(str(error), code=2)
    if config.rollout.rollout_num_gpus and name != "refit":
        launcher.fail(
            f"rollout.rollout_num_gpus: must be 0, because `bench {name}` has no trainer beside an engine", code=2
        )
    if not is_rank:
        launcher.launch(world_size)
    run_bench(name, model, config, options, out)
    sys.stdout.flush()
    os._exit(0)  # an interpreter that ends frees the engine's memory, at which torch_memory_saver fails the process
