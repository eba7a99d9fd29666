"""Log-probs of an engine that decodes in bf16 and of the trainer that reads: the same bits, while weights change."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tomli_w
import torch

from miles_spmd.bench.run import bench_config
from miles_spmd.config.load import load_config
from miles_spmd.invariant.flash import flash_attention
from miles_spmd.models.attention import PLAIN, Form
from miles_spmd.models.random import write_random_checkpoints
from miles_spmd.telemetry.metrics import phase_times
from miles_spmd.training.attention import _varlen_attention
from tests.gpu.machine import measured, needs
from tests.gpu.test_grpo import train
from tests.invariant.side_by_side import train_and_compare
from tests.invariant.test_linear import assert_ranks_make_the_same_columns, assert_ranks_make_the_same_sum
from tests.ranks import Ranks

ENGINE = ["sglang.cuda_graph_bs_decode=[1,8,64]", "sglang.chunked_prefill_size=1024", "sglang.mem_fraction_static=0.3"]
EXACT = ["determinism.parity=bitwise", "megatron.lr=1e-5", *ENGINE]
LARGE = ["sglang.mem_fraction_static=0.2"]  # trainer and engine both stay on the device
BOTH_TP2 = ["megatron.tensor_model_parallel_size=2", "sglang.tp_size=2"]


@pytest.mark.parametrize(
    ("model", "ranks_needed", "answer", "overrides"),
    [
        pytest.param("random:qwen3-0.6b", 1, 96, ["rollout.rollout_temperature=1.0"], marks=needs(1)),
        pytest.param("random:qwen3-0.6b", 1, 96, ["rollout.rollout_temperature=0.7"], marks=needs(1)),
        pytest.param("random:qwen2.5-1.5b", 1, 96, [], marks=needs(1)),
        pytest.param("random:llama-3.2-1b", 1, 96, [], marks=needs(1)),
        pytest.param("random:qwen3-0.6b", 1, 96, ["sglang.attention_backend=triton"], marks=needs(1)),
        pytest.param("random:qwen3-4b", 1, 48, LARGE, marks=needs(1)),
        pytest.param("random:qwen3-30b-a3b/4", 1, 96, LARGE, marks=needs(1)),
        pytest.param("random:qwen3-0.6b", 2, 96, BOTH_TP2[:1], marks=needs(2)),
        pytest.param("random:qwen3-0.6b", 2, 96, BOTH_TP2[1:], marks=needs(2)),
        pytest.param(
            "random:qwen3-0.6b", 4, 96, ["megatron.tensor_model_parallel_size=4", "sglang.tp_size=2"], marks=needs(4)
        ),
        pytest.param("random:qwen3-0.6b", 2, 96, BOTH_TP2, marks=needs(2)),
        pytest.param("random:qwen3-0.6b", 2, 96, [*BOTH_TP2, "megatron.sequence_parallel=true"], marks=needs(2)),
    ],
)
def test_decoded_log_probs_are_the_trainers(
    ranks: Ranks, model: str, ranks_needed: int, answer: int, overrides: list[str]
) -> None:
    config = bench_config(model, [*EXACT, *overrides], ranks_needed)
    write_random_checkpoints(config.model.checkpoints)
    found = ranks.run(ranks_needed, train_and_compare, config, 20, 3 * answer, answer, 2)
    measured(f"parity of {model} on {ranks_needed} GPUs, {' '.join(overrides)}", asdict(found[0]))
    assert found[0].tokens > 0
    assert all(norm > 0 for norm in found[0].grad_norms)
    assert [(of_rank.mismatches, of_rank.largest) for of_rank in found] == [(0, 0.0)] * ranks_needed


@needs(1)
def test_a_run_has_it_without_being_asked(tmp_path: Path) -> None:
    prompts = [json.dumps({"prompt": f"{i:03} " * (4 + i), "label": ""}) for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    recipe = tmp_path / "recipe.toml"
    settings = {
        "run": {"num_rollout": 4},
        "model": {"hf_checkpoint": "random:qwen3-0.6b"},
        "data": {"prompt_data": str(tmp_path / "prompts.jsonl")},
        "rollout": {"rollout_batch_size": 16, "n_samples_per_prompt": 4, "rollout_max_response_len": 100},
        "reward": {"rm_type": "miles_spmd.bench.step:by_chance"},
        "checkpoint": {"export_final": False},
        "megatron": {"lr": 1e-5, "clip_grad": 1.0},
        "sglang": {"cuda_graph_bs_decode": [1, 8, 64]},
    }
    recipe.write_text(tomli_w.dumps(settings))
    steps = [m for step, m in train(recipe, tmp_path, "run", 1).items() if step]
    assert load_config(tmp_path / "run" / "config.toml").determinism.parity == "bitwise"
    measured("a run with parity by default, seconds of the last step", dict(phase_times(steps[-1])))
    assert len(steps) == 4
    assert all(m["parity/tokens"] == 16 * 4 * 100 and m["train/grad_norm"] > 0 for m in steps)
    assert [(m["parity/mismatches"], m["parity/max_abs_diff"]) for m in steps] == [(0, 0)] * 4


@needs(1)
@pytest.mark.parametrize("rows", [1, 64, 3000])
def test_products_of_ranks(rows: int) -> None:
    assert_ranks_make_the_same_sum(rows, 9728, 2560, torch.bfloat16, "cuda")
    assert_ranks_make_the_same_columns(rows, 2560, 9728, torch.bfloat16, "cuda")


@needs(1)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("form", [PLAIN, Form(200), Form(200, 5.0), Form(0, 5.0)])
def test_gradients_of_all_attentions(form: Form, with_sinks: bool) -> None:
    """Of FlashAttention 3, of ours, which shares a backward pass with it and not what that starts from, and of torch's
    where bitwise parity is off."""
    lengths = torch.tensor([0, 1500, 1, 700], device="cuda").cumsum(0).int()
    tensors = [torch.randn(2201, heads, 128, device="cuda").bfloat16().requires_grad_() for heads in (16, 8, 8)]
    sinks = torch.randn(16, device="cuda").bfloat16().requires_grad_() if with_sinks else None
    where = (lengths, lengths), (1500, 1500), 128**-0.5, form, sinks
    outs = (
        flash_attention(*tensors, *where),
        flash_attention(*tensors, *where, split=1024),
        _varlen_attention(*tensors, *where),
    )
    gradient = torch.randn_like(outs[0])
    inputs = [*tensors, *([sinks] if with_sinks else [])]
    expected, *others = ([out, *torch.autograd.grad(out, inputs, gradient)] for out in outs)
    for found in others:
        for their, our in zip(expected, found, strict=True):
            torch.testing.assert_close(our, their, rtol=2**-6, atol=2**-6 * float(their.abs().max()))
