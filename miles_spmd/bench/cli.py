"""``miles-spmd bench``: one verb per measurement."""

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
    steps: Annotated[int, typer.Option(min=3, help="Steps of which the median is reported.")] = 15,
    trl: Annotated[Path | None, typer.Option(help="A Python interpreter that has TRL, to measure TRL as well.")] = None,
) -> None:
    """Time a GRPO step by phase on small models."""
    from rich.console import Console

    from miles_spmd.bench.quickstart import bench_quickstart, show

    show(bench_quickstart(ranks, steps, trl), Console())


@app.command("algorithms")
def bench_algorithms(
    recipes: Annotated[list[Path] | None, typer.Argument(help="Default: configs/algorithms/*.toml except sft.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe, seeds 1, 2, ...")] = 3,
    samples: Annotated[
        int, typer.Option(min=1, help="Samples that a run trains on; preference recipes keep their own number.")
    ] = 20_480,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs in parallel; default: one per core.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Measure the held-out accuracy that each algorithm reaches on the quickstart's task with the same budget.

    Requires a finished quickstart.
    """
    from miles_spmd.bench.algorithms import bench_algorithms

    try:
        bench_algorithms(recipes, seeds, samples, jobs or len(os.sched_getaffinity(0)), out)
    except FileNotFoundError as error:
        launcher.fail(str(error))


@app.command("loss")
def bench_loss(
    vocabulary: Annotated[int, typer.Option(min=4, help="Size of the vocabulary.")] = 151_936,
    tokens: Annotated[int, typer.Option(min=2, help="Scored tokens of a micro-batch.")] = 16_384,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the hidden states.")] = 1024,
    dtype: Annotated[
        str, typer.Option(help="dtype of hidden states and output layer: float32 or bfloat16.")
    ] = "float32",
    top_p: Annotated[float, typer.Option(help="top_p of the rollout's sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="top_k of the rollout's sampling.")] = -1,
) -> None:
    """Measure memory and time of log-probs, entropy and their gradient, from hidden states on."""
    from rich.console import Console

    from miles_spmd.bench.loss import Shape, bench_loss, show

    shape = Shape(vocabulary, tokens, hidden, dtype, top_p, top_k)
    show(shape, bench_loss(shape), Console())


@app.command("sandbox")
def bench_sandbox(
    jobs: Annotated[int, typer.Option(min=1, help="Sandboxes at the same time.")] = 2,
    tests: Annotated[int, typer.Option(min=1, help="Tests of a label.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time of each measurement.")] = 5.0,
) -> None:
    """Measure how many programs the sandbox runs per second, and how many responses the reward `code` scores."""
    from rich.console import Console

    from miles_spmd.bench.sandbox import bench_sandbox, show
    from miles_spmd.sandbox.sandbox import SandboxError

    try:
        show(bench_sandbox(jobs, tests, seconds), Console())
    except SandboxError as error:
        launcher.fail(str(error))


@app.command("endpoint")
def bench_endpoint(
    sessions: Annotated[int, typer.Option(min=1, help="Sessions at the same time.")] = 100,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of which the median is reported.")] = 5,
) -> None:
    """Measure what a turn of a session costs where the policy responds at once, without an engine."""
    from rich.console import Console

    from miles_spmd.bench.endpoint import bench_endpoint
    from miles_spmd.bench.sandbox import show
    from miles_spmd.models.random import resolve, write_random_checkpoints

    write_random_checkpoints([folder := resolve(Path("random:smollm2-135m/1"))])
    show(bench_endpoint(folder, sessions, turns, repeats), Console())


Model = Annotated[str, typer.Option("--model", help="Checkpoint folder, or random:SHAPE.")]
Out = Annotated[Path | None, typer.Option(help="JSON file for the result.")]
Repeats = Annotated[int, typer.Option(min=1, help="Repetitions of which the median is reported.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
ResponseTokens = Annotated[int, typer.Option(min=1, help="Tokens of a response.")]


def _old_name(tokens: int | None) -> int | None:
    if tokens is not None:
        launcher.warn("--answer-tokens is now --response-tokens; the old name will be removed in the next version")
    return tokens


OldResponseTokens = Annotated[int | None, typer.Option("--answer-tokens", min=1, hidden=True, callback=_old_name)]


@app.command("refit")
def bench_refit(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    repeats: Repeats = 10,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Time each part of a refit, and for how long it stops the engine."""
    _measure("refit", model, overrides, nproc_per_node, out, repeats=repeats)


@app.command("sleep")
def bench_sleep(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    cycles: Annotated[int, typer.Option(min=2, help="Cycles of release and resume.")] = 50,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Time release and resume of the engine's memory, and measure whether memory leaks."""
    _measure("sleep", model, overrides, nproc_per_node, out, cycles=cycles)


@app.command("rollout")
def bench_rollout(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    prompts: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 256,
    prompt_tokens: PromptTokens = 256,
    response_tokens: ResponseTokens = 512,
    old_response_tokens: OldResponseTokens = None,
    peer: Annotated[bool, typer.Option(help="Also measure plain sglang.Engine.")] = True,
    repeats: Repeats = 3,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Time generation, compared with plain sglang.Engine."""
    response_tokens = old_response_tokens or response_tokens
    sizes = {"prompts": prompts, "prompt_tokens": prompt_tokens, "response_tokens": response_tokens}
    cache = [f"rollout_batch_size={-(-prompts // 2)}", "n_samples_per_prompt=2"]
    cache += [f"rollout_max_prompt_len={prompt_tokens}", f"rollout_max_response_len={response_tokens}"]
    _measure("rollout", model, cache + (overrides or []), nproc_per_node, out, **sizes, repeats=repeats, peer=peer)


@app.command("train")
def bench_train(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    packing: Annotated[list[str], typer.Option(help="SEQUENCESxTOKENS of a micro-batch.")] = ["1x4096", "4x4096"],  # noqa: B006
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of an optimizer step.")] = 4,
    repeats: Repeats = 3,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Measure optimizer steps and log-probs: tokens per second, utilisation, peak memory."""
    packings = [tuple(map(int, word.split("x"))) for word in packing]
    options = {"packings": packings, "micro_batches": micro_batches, "repeats": repeats}
    _measure("train", model, overrides, nproc_per_node, out, **options)


@app.command("save")
def bench_save(
    overrides: Overrides = None,
    model: Model = "random:smollm2-135m",
    folder: Annotated[Path, typer.Option(help="Where the checkpoints are written, and removed again.")] = Path("runs"),
    offloaded: Annotated[bool, typer.Option("--offloaded", help="Of a trainer that is in host memory.")] = False,
    repeats: Repeats = 3,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Time a checkpoint: how long training waits, how long it is written beside the training, and how long it takes to
    load."""
    _measure("save", model, overrides, nproc_per_node, out, folder=str(folder), offloaded=offloaded, repeats=repeats)


@app.command("step")
def bench_step(
    overrides: Overrides = None,
    model: Model = "random:qwen2.5-1.5b",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step.")] = 32,
    samples: Annotated[int, typer.Option(min=2, help="Responses to each prompt.")] = 16,
    prompt_tokens: PromptTokens = 128,
    response_tokens: ResponseTokens = 512,
    old_response_tokens: OldResponseTokens = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before the measured ones.")] = 2,
    repeats: Repeats = 5,
    determinism: Annotated[
        bool, typer.Option("--determinism", help="Measure the cost of ledger, determinism and bitwise parity.")
    ] = False,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Time a GRPO step of `train` by phase."""
    from miles_spmd.bench.determinism import bench_determinism
    from miles_spmd.bench.result import make_result
    from miles_spmd.bench.run import publish
    from miles_spmd.bench.step import bench_step

    _, ranks = launcher.ranks(nproc_per_node)
    response_tokens = old_response_tokens or response_tokens
    lengths = {"prompt_tokens": prompt_tokens, "response_tokens": response_tokens}
    sizes = {"prompts": prompts, "samples": samples, **lengths}
    measure = bench_determinism if determinism else bench_step
    rows = measure(model=model, ranks=ranks, overrides=overrides or [], **sizes, warm_up=warm_up, steps=repeats)
    publish(make_result("step", model, ranks, {"overrides": overrides or [], **sizes}, rows), out)


@app.command("turns")
def bench_turns(
    overrides: Overrides = None,
    model: Model = "random:qwen3-0.6b",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step.")] = 8,
    samples: Annotated[int, typer.Option(min=2, help="Sessions of each prompt.")] = 8,
    number: Annotated[int, typer.Option("--turns", min=1, help="Responses in a session.")] = 8,
    prompt_tokens: PromptTokens = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response.")] = 128,
    given: Annotated[int, typer.Option(min=0, help="Tokens that the environment gives between two.")] = 64,
    tail: Annotated[bool, typer.Option("--tail", help="Lengths with a long tail, of at most --new-tokens.")] = False,
    pause: Annotated[float, typer.Option(min=0, help="Mean seconds of the environment between two responses.")] = 0.0,
    cache_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of an engine's KV cache: with all sessions at once, and with as many as fit."),
    ] = None,
    clients: Annotated[
        bool,
        typer.Option("--clients", help="Conversations: in the environment's process, and of clients of a session."),
    ] = False,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before the measured ones.")] = 2,
    repeats: Repeats = 5,
    nproc_per_node: Processes = None,
    out: Out = None,
) -> None:
    """Time rollouts of several turns: tokens per second, and the share of prefixes that the engine has already."""
    from miles_spmd.bench.result import make_result
    from miles_spmd.bench.run import publish
    from miles_spmd.bench.turns import bench_clients, bench_turns

    if clients and (tail or pause or cache_tokens):
        launcher.fail("--clients: not with --tail, --pause or --cache-tokens", code=2)
    _, ranks = launcher.ranks(nproc_per_node)
    sizes: dict[str, Any] = {"prompts": prompts, "samples": samples, "prompt_tokens": prompt_tokens}
    shape: dict[str, Any] = {"number": number, "new_tokens": new_tokens, "given": given}
    if not clients:
        shape |= {"tail": tail, "pause": pause, "cache_tokens": cache_tokens}
    measure = bench_clients if clients else bench_turns
    rows = measure(overrides or [], ranks=ranks, model=model, warm_up=warm_up, steps=repeats, **shape, **sizes)
    publish(make_result("turns", model, ranks, {"overrides": overrides or [], **shape, **sizes}, rows), out)


def _measure(
    name: str, model: str, overrides: list[str] | None, nproc: int | None, out: Path | None, **options: Any
) -> None:
    """Run a measurement as a rank, or launch ranks that do."""
    is_rank, world_size = launcher.ranks(nproc)
    from miles_spmd.bench.run import bench_config, run_bench
    from miles_spmd.config.load import ConfigError

    with launcher.failing(ConfigError, code=2):
        config = bench_config(model, overrides or [], world_size)
    if config.rollout.rollout_num_gpus and name != "refit":
        launcher.fail(
            f"rollout.rollout_num_gpus: must be 0, because `bench {name}` does not run trainer and engine together",
            code=2,
        )
    if not is_rank:
        launcher.launch(world_size)
    run_bench(name, model, config, options, out)
    sys.stdout.flush()
    os._exit(0)  # a regular exit frees the engine's memory, on which torch_memory_saver crashes the process
