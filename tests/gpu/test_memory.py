"""Trainer and engine take turns on a real device: nothing is lost, nothing leaks, and what is said when it is full."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from miles_spmd.config import Config
from miles_spmd.types.request import Output
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence
from tests.generation.conformance import prompt, request
from tests.generation.conformance import run as answer
from tests.gpu.machine import ENGINE, measured, needs
from tests.models.random_checkpoint import random_checkpoint
from tests.ranks import Ranks

GIB, MIB = 2**30, 2**20
CYCLES, WARM_UP = 50, 5
GRAPHS = {"attention_backend": "triton", "cuda_graph_bs_decode": [1, 8, 64]}


def a_run(offload: bool = False) -> Config:
    """Qwen3-0.6B in bf16, whose trainer computes the same bits each time."""
    tables = {
        "model": {"hf_checkpoint": random_checkpoint("random:qwen3-0.6b")},
        "data": {"prompt_data": "none", "rollout_max_prompt_len": 64},
        "rollout": {"rollout_batch_size": 32, "n_samples_per_prompt": 8},
        "train": {"offload_train": offload, "max_tokens_per_gpu": 4096},
        "determinism": {"deterministic": True},
        "megatron": {"lr": 1e-4, "clip_grad": 1.0},
        "sglang": GRAPHS,
    }
    return Config.model_validate(tables)


def batch() -> list[MicroBatch]:
    rng = np.random.default_rng(0)

    def sequence(length: int) -> TrainSequence:
        weights = np.full(length, 1e-3, np.float32)
        weights[0] = 0
        tokens, advantages = rng.integers(0, 150_000, length, np.int32), rng.choice([-1.0, 1.0], length)
        return TrainSequence(tokens, weights, advantages.astype(np.float32), np.full(length, -12, np.float32))

    return [[sequence(1000), sequence(300)], [sequence(2000)]]


def step_of(roles: Any, micro_batches: list[MicroBatch]) -> tuple[float, float]:
    """Loss and norm of the gradient of an optimizer step."""
    from miles_spmd.platform.determinism import deterministic_kernels

    with deterministic_kernels():
        result = roles.actor.train_step(micro_batches)
    assert not result.skipped
    return result.sums[0]["loss"], result.grad_norm


def alone(run: Config) -> tuple[list[Any], dict[str, Tensor]]:
    """Fifty steps and no engine."""
    from miles_spmd.platform.determinism import pin_environment
    from miles_spmd.training.roles import Roles

    pin_environment()
    roles, micro_batches = Roles(run), batch()
    numbers = [step_of(roles, micro_batches) for _ in range(CYCLES)]
    return numbers, {name: weight.cpu() for name, weight in roles.actor.weights().items()}


def in_turns(run: Config, levels: list[str]) -> dict[str, Any]:
    """The same steps, with a refit, answers and a release before each: the engine releases ``levels``, one in each."""
    from miles_spmd.platform.determinism import pin_environment
    from miles_spmd.training.roles import Roles
    from miles_spmd.types.phase import Phase
    from miles_spmd.worker.device_turns import DeviceTurns
    from miles_spmd.worker.memory_account import MemoryAccount
    from miles_spmd.worker.stopwatch import Stopwatch
    from miles_spmd.worker.worker import make_engine

    pin_environment()
    micro_batches, memory = batch(), MemoryAccount(run, 1)
    memory.require_room(training=True)
    roles = Roles(run)
    memory.trainer = roles.memory
    memory.record("trainer built")
    if run.train.offload_train:
        roles.move_out()
    engine: Any = make_engine(run)
    memory.built(engine.memory)
    memory.record("engine built")
    turns = DeviceTurns(run, engine, roles, Stopwatch(), memory)
    asked = [request(f"r{i}", prompt(i % 4, 40), seed=i, ignore_eos=True, max_new_tokens=16) for i in range(16)]
    whole, numbers, tokens, device, host, free = engine.memory(), [], [], [], [], []
    for cycle, level in enumerate(levels):
        memory.config = run.model_copy(update={"rollout": run.rollout.model_copy(update={"offload_rollout": level})})
        memory.begin(Phase.REFIT, cycle)
        counts = turns.refit(cycle)
        assert counts.checksum_mismatches == 0
        outputs = answer(engine, asked)
        tokens.append([outputs[one.rid].output_ids for one in asked])
        memory.begin(Phase.TRAIN, cycle)
        before = torch.cuda.mem_get_info()[0]
        turns.release()
        free.append((torch.cuda.mem_get_info()[0] - before) / GIB)
        with memory.work("optimizer step"):
            numbers.append(step_of(roles, micro_batches))
        device.append(-torch.cuda.mem_get_info()[0] / MIB)
        host.append(psutil.Process().memory_info().rss / MIB)
    slope = lambda values: float(np.polynomial.polynomial.polyfit(range(len(values)), values, 1)[1])  # noqa: E731
    many = len(levels) > 2 * WARM_UP
    return {
        "numbers": numbers,
        "tokens": tokens,
        "weights": {name: weight.cpu() for name, weight in roles.actor.weights().items()},
        "given back": free,
        "cache": whole.kv_cache / GIB,
        "engine": sum(whole) / GIB,
        "memory": memory.take(),
        "holders": {name: size / GIB for name, size in memory.holders().items()},
        "working": memory.measured["activations"] / GIB,
        "planned": memory.plan.working / GIB,
        "GPU growth MiB/cycle": slope(device[WARM_UP:]) if many else 0.0,
        "host growth MiB/cycle": slope(host[WARM_UP:]) if many else 0.0,
    }


@needs(1)
def test_fifty_cycles_change_nothing(ranks: Ranks) -> None:
    ranks.stop()  # an engine's memory stays reserved in its process: begin with a new one
    ((expected, weights),) = ranks.run(1, alone, a_run())
    (cycled,) = ranks.run(1, in_turns, a_run(offload=True), ["all"] * CYCLES)
    ranks.stop()
    measured(
        f"{CYCLES} cycles of refit, answers, release, optimizer step; Qwen3-0.6B, everything given up, offload_train",
        {name: cycled[name] for name in ("GPU growth MiB/cycle", "host growth MiB/cycle", "holders")}
        | {"given back": cycled["given back"][-1]},
    )
    assert cycled["numbers"] == expected
    for name, weight in cycled["weights"].items():
        assert torch.equal(weight, weights[name]), name
    assert cycled["GPU growth MiB/cycle"] < 0.1
    assert cycled["host growth MiB/cycle"] < 1


@needs(1)
def test_what_is_given_up_changes_memory_and_nothing_else(ranks: Ranks) -> None:
    results = []
    levels = ["kv_cache", "all", "auto"]
    for given_up in (["nothing"] * len(levels), levels):
        ranks.stop()
        results += ranks.run(1, in_turns, a_run(), given_up)
    ranks.stop()
    kept, changing = results
    measured(
        f"three cycles, giving up {', '.join(levels)}",
        {name: changing[name] for name in ("given back", "cache", "engine", "working", "planned", "memory")},
    )
    assert changing["numbers"] == kept["numbers"]
    assert changing["tokens"] == kept["tokens"]
    for name, weight in changing["weights"].items():
        assert torch.equal(weight, kept["weights"][name]), name
    of_cache, of_all, of_auto = changing["given back"]
    assert of_cache >= kept["cache"]
    assert of_all > of_cache + 1  # GiB of weights
    assert all(abs(size) < 0.1 for size in (of_auto, *kept["given back"]))  # a small model: all fits
    assert kept["working"] < kept["planned"] * 1.25 + 2


# --- too little ------------------------------------------------------------------------------------------------------


def fill(leave: int) -> list[Tensor]:
    """Take all of the device but ``leave`` bytes."""
    torch.cuda.empty_cache()
    filler = []
    while (free := torch.cuda.mem_get_info()[0] - leave) > 8 * MIB:
        filler.append(torch.empty(min(free - 4 * MIB, 16 * GIB), dtype=torch.uint8, device="cuda"))
    return filler


def exhausted_training(run: Config) -> list[str]:
    """What is said when torch finds no memory, and when cuBLAS finds none because torch keeps what it has freed."""
    from miles_spmd.training.roles import Roles
    from miles_spmd.types.phase import Phase
    from miles_spmd.worker.memory_account import DeviceMemoryError, MemoryAccount

    memory = MemoryAccount(run, 1)
    roles = Roles(run)
    memory.trainer = roles.memory
    memory.begin(Phase.TRAIN, 3)

    def failing_step() -> str:
        with pytest.raises(DeviceMemoryError) as caught, memory.explaining():
            roles.actor.train_step(batch())
        return str(caught.value)

    filler = fill(GIB // 2)
    texts = [failing_step()]
    del filler
    texts.append(failing_step())  # the backward pass, which begins here, has a handle of its own
    torch.cuda.empty_cache()
    assert not roles.actor.train_step(batch()).skipped  # the process is whole: another step works
    return texts


@needs(1)
def test_a_step_that_does_not_fit_is_explained(ranks: Ranks) -> None:
    ranks.stop()
    ((of_torch, of_cublas),) = ranks.run(1, exhausted_training, a_run())
    ranks.stop()
    measured("out of memory in a step", {"torch": of_torch, "cuBLAS": of_cublas})
    assert of_torch.startswith("no memory left on GPU 0: CUDA out of memory. Tried to allocate")
    assert of_cublas.startswith("no memory left on GPU 0: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    for text in (of_torch, of_cublas):
        assert all(holder in text for holder in ("optimizer 6.66", "gradients 2.22", "parameters 1.11"))
        assert "What helps: lower train.max_tokens_per_gpu (4096)" in text
    assert "held: other tensors" in of_torch


def no_room(run: Config) -> list[str]:
    from miles_spmd.worker.memory_account import MemoryAccount

    filler, warnings = fill(8 * GIB), list[str]()
    MemoryAccount(run, 1, warn=warnings.append).require_room(training=True)
    del filler
    return warnings


@needs(1)
def test_too_little_is_a_warning_before_anything_is_built(ranks: Ranks) -> None:
    """Not an error: what fills the device may go, and activations are estimated."""
    (warnings,) = ranks.run(1, no_room, a_run())
    pattern = r"training takes at least 1\d\.\d\d GiB on this rank, and [78]\.\d\d of the \d+\.\d GiB"
    assert any(re.match(pattern, text) for text in warnings), warnings


def exhausted_engine() -> dict[str, Any]:
    """Many requests at a time, whose logits have no room."""
    import contextlib
    import io

    from miles_spmd.generation.sglang.engine import SglangEngine
    from miles_spmd.models import load_family
    from miles_spmd.weights import hugging_face
    from miles_spmd.worker.service import step

    folder = random_checkpoint("random:qwen3-0.6b")
    own = {"max_total_tokens": 100_000, "cuda_graph_bs_decode": [1, 8], "attention_backend": "triton"}
    engine = SglangEngine(folder, dtype="bfloat16", server_args=ENGINE | own, context_length=256)
    hugging_face.load(folder, engine.weights(), engine.layout(), load_family(folder))
    engine.commit(0)
    asked = [
        request(f"r{i}", prompt(i, 20 + i % 7), seed=i, ignore_eos=True, max_new_tokens=24, temperature=0.2)
        for i in range(600)
    ]
    expected = answer(engine, asked)
    filler = fill(600 * MIB)
    outputs: dict[str, Output] = {}
    retries, said = 0, io.StringIO()
    engine.submit(asked)
    with contextlib.redirect_stdout(said):
        while not engine.idle:
            finished = step(engine)
            retries += finished is None
            outputs |= {output.rid: output for output in finished or []}
    same = sum(outputs[rid].output_ids == expected[rid].output_ids for rid in expected)
    del filler
    again = answer(engine, asked)
    return {
        "retries": retries,
        "answers": len(outputs),
        "of them with the same tokens": same,
        "again with room": sum(again[rid].output_ids == expected[rid].output_ids for rid in expected),
        "said": said.getvalue(),
    }


@needs(1)
def test_a_rollout_that_does_not_fit_runs_in_smaller_batches(ranks: Ranks) -> None:
    ranks.stop()
    (found,) = ranks.run(1, exhausted_engine)
    ranks.stop()
    measured("600 requests with 600 MiB to compute in", found)
    assert 1 <= found["retries"] <= 10
    assert found["answers"] == 600
    assert "out of memory; again with at most" in found["said"]
