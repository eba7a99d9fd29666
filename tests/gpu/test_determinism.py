"""Runs at once, in each other's way, are equal in every entry of their ledgers, on as many GPUs or on more; and a
replay is equal to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from miles_spmd.ledger.chain import read_record, verify
from miles_spmd.ledger.compare import compare
from miles_spmd.quickstart import checkpoint
from miles_spmd.quickstart.__main__ import GRPO
from miles_spmd.quickstart.assets import build_assets
from miles_spmd.telemetry.trackers import METRICS_FILE, read_metrics
from tests.gpu import machine

STEPS = 5
COMMAND = [sys.executable, "-m", "miles_spmd"]
TP2 = ["megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true", "sglang.tp_size=2"]
ZERO = ["megatron.use_distributed_optimizer=true"]
TE = ["megatron.transformer_impl=transformer_engine"]
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,  # SGLang's kernels want heads and experts of at least that
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(machine.COUNT)))).split(",")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's, and its model with experts in ``experts/``."""
    folder = tmp_path_factory.mktemp("assets")
    build_assets(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "CONFIG", checkpoint.CONFIG | EXPERTS)
        build_assets(folder / "experts")
    return folder


@pytest.mark.parametrize(
    ("ranks", "model", "backend", "dtype", "layout"),
    [
        pytest.param(1, "", "triton", "bfloat16", [], marks=machine.needs(1), id="bf16"),
        pytest.param(1, "", "triton", "float32", [], marks=machine.needs(1), id="fp32"),
        pytest.param(
            1,
            "",
            "fa3",
            "bfloat16",
            TE,
            marks=[machine.needs(1), machine.needs_transformer_engine],
            id="transformer-engine",
        ),
        pytest.param(1, "experts", "fa3", "bfloat16", [], marks=machine.needs(1), id="experts"),
        pytest.param(2, "", "fa3", "bfloat16", TP2, marks=machine.needs(2), id="tp2"),
        pytest.param(2, "", "triton", "bfloat16", ZERO, marks=machine.needs(2), id="dp2"),
    ],
)
def test_two_runs_are_equal(
    assets: Path, tmp_path: Path, ranks: int, model: str, backend: str, dtype: str, layout: list[str]
) -> None:
    own = [f"--nproc-per-node={ranks}", *settings(assets / model, tmp_path, backend, dtype), *layout]
    run_together([["train", str(GRPO), f"run.name={name}", *own] for name in "ab"])
    a, b = (verify(tmp_path / name) for name in "ab")
    assert len(a.steps) == STEPS
    assert sum(step.samples.dropped for step in a.steps.values() if step.samples) > 0
    assert len({update.weights for step in a.steps.values() for update in step.updates}) == 2 * STEPS
    comparison = compare(a, b)
    assert comparison.equal, comparison.difference
    metrics = read_metrics(tmp_path / "a" / METRICS_FILE)
    assert metrics[STEPS]["train/grad_norm"] > 0
    ledger = (tmp_path / "a" / "ledger" / "chain.jsonl").stat().st_size / STEPS
    machine.measured(f"ledger, {ranks} x {dtype}", {"bytes a step": ledger, **last_seconds(metrics)})
    if ranks == 1:
        run_together([["replay", str(tmp_path / "a"), "--step", str(STEPS - 1), "--nproc-per-node=1"]])


@machine.needs(2)
@pytest.mark.parametrize("more", [["train.leaf_tokens=1"], ["train.leaf_tokens=64", *ZERO]], ids=["loose", "packed"])
def test_ranks_and_packing_change_no_bit(assets: Path, tmp_path: Path, more: list[str]) -> None:
    """On 1, 2 and 4 GPUs, as many as there are, all at once."""
    own = [*settings(assets, tmp_path, "triton", "bfloat16"), "train.reduction_leaves=8", *more]
    sizes = [size for size in (1, 2, 4) if size <= machine.COUNT]
    commands = [
        ["train", str(GRPO), f"run.name=on_{n}", f"--nproc-per-node={n}", f"train.max_tokens_per_gpu={8192 // n}", *own]
        for n in sizes
    ]
    run_together(commands, [DEVICES[-size:] for size in sizes])
    alone, *others = (verify(tmp_path / f"on_{size}") for size in sizes)
    assert len(alone.steps) == STEPS
    assert sum(step.samples.dropped for step in alone.steps.values() if step.samples) > 0
    assert len({update.weights for step in alone.steps.values() for update in step.updates}) == 2 * STEPS
    for other in others:
        comparison = compare(alone, other)
        assert comparison.equal, comparison.difference
        assert not comparison.conditions
    last = alone.steps[STEPS - 1].updates[-1]
    machine.measured(f"ledgers on {sizes} GPUs are equal", {"last norm": last.grad_norm, "last loss": last.sums})


@machine.needs(1)
def test_the_gradient_is_that_of_any_run(assets: Path, tmp_path: Path) -> None:
    """Other kernels compute the same: one optimizer step on the same answers, in fp32."""
    plain = ["--nproc-per-node=1", *settings(assets, tmp_path, "triton", "float32"), "run.num_rollout=1"]
    names: dict[str, list[str]] = {"deterministic": [], "plain": ["determinism.deterministic=false"]}
    run_together([["train", str(GRPO), f"run.name={name}", *plain, *more] for name, more in names.items()])
    a, b = (read_record(tmp_path / name).steps[0] for name in names)
    assert a.samples is not None
    assert b.samples is not None
    assert a.samples.responses == b.samples.responses
    norms = [run.updates[0].grad_norm for run in (a, b)]
    machine.measured("gradient norm, deterministic and plain", dict(zip(names, norms)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def settings(assets: Path, folder: Path, backend: str, dtype: str) -> list[str]:
    return [
        f"model.hf_checkpoint={assets}/model",
        f"model.dtype={dtype}",
        f"data.prompt_data={assets}/train.jsonl",
        "reward.rm_type=tests.recipe_run:coin",
        "algorithm.dynamic_sampling_filter=reward_nonzero_std",
        "rollout.rollout_batch_size=16",
        "rollout.n_samples_per_prompt=3",
        "train.global_batch_size=24",
        f"run.output_dir={folder}",
        f"run.num_rollout={STEPS}",
        "eval.eval_interval=0",
        "eval.eval_prompt_data={}",
        "checkpoint.export_final=false",
        "checkpoint.save_interval=3",
        "telemetry.progress=plain",
        "determinism.deterministic=true",
        f"sglang.attention_backend={backend}",
        "sglang.cuda_graph_bs_decode=[8,64]",
        "sglang.mem_fraction_static=0.2",
    ]


def last_seconds(metrics: dict[int, dict[str, float]]) -> dict[str, float]:
    return {name: value for name, value in metrics[STEPS].items() if name.startswith("perf/") and "time" in name}


def run_together(commands: Sequence[Sequence[str]], devices: Sequence[Sequence[str]] | None = None) -> None:
    """All of them must succeed. ``devices``: for each, those that it may use; default: all."""
    running = [
        subprocess.Popen(
            [*COMMAND, *command],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(own)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, own in zip(commands, devices or [DEVICES] * len(commands), strict=True)
    ]
    outputs = [process.communicate(timeout=280)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), json.dumps(outputs)[-6000:]
