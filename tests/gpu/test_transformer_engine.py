"""Layers of Transformer Engine on GPUs: as right as the local ones in bf16, and as FP8 is meant to be."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from miles_spmd.config import Config
from miles_spmd.quickstart import checkpoint
from miles_spmd.quickstart.__main__ import SFT as SFT_RECIPE
from miles_spmd.quickstart.assets import build_assets
from miles_spmd.types.train_sequence import TrainSequence
from tests.gpu.machine import measured, needs, needs_transformer_engine
from tests.gpu.test_grpo import grpo, series, train
from tests.models import tiny
from tests.ranks import Ranks
from tests.training.cases import (
    CP2,
    EP2,
    PLAIN_SGD,
    PP2,
    SP,
    TP2,
    Held,
    build,
    config,
    held,
    losses,
    oracle_gradient,
    oracle_scores,
    sequences,
    share,
    unshare,
    whole_weights,
)
from tests.training.test_checkpoint import history

pytestmark = needs_transformer_engine

# FP8 wants sides of 128, fused attention heads of 64
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.05}
EXPERTS = WIDE | {"num_experts": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}
MODELS = {
    "wide": ("Qwen3", WIDE),
    "wide-experts": ("Qwen3Moe", EXPERTS | {"num_experts_per_tok": 2}),
    "wide-all-experts": ("Qwen3Moe", EXPERTS | {"num_experts_per_tok": 4}),  # no ties that a last bit could decide
}
BATCH = sequences((5, 17, 40, 9, 30, 31, 2, 12))
BF16, SFT = {"model": {"dtype": "bfloat16"}}, {"run": {"mode": "sft", "num_rollout": 10}}
TE = {"transformer_impl": "transformer_engine"}
FP8 = TE | {"fp8": "hybrid"}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

# Rounding to 3 bits behind the first (e4m3) errs by 2^-4 at most, in the root mean square of a binade by 2.6 %, and to
# 2 bits (e5m2, which "hybrid" has for gradients) by twice that. A product has two such factors. What comes out of
# 4 layers of 4 linears has been through 16 of them, and a gradient through 16 more whose one factor is a gradient.
FP8_PRODUCT, FP8_BACKWARD_PRODUCT = 0.026 * 2**0.5, 0.026 * 5**0.5
FP8_LOG_PROBS, FP8_GRADIENT = 4 * FP8_PRODUCT, 4 * (FP8_PRODUCT**2 + FP8_BACKWARD_PRODUCT**2) ** 0.5
GAIN = 1.5  # what norms and softmax may make of an error, on which the estimates are silent


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in MODELS.items():
        monkeypatch.setitem(tiny.CONFIGS, name, model)


class Scored(NamedTuple):
    log_probs: list[np.ndarray] | None
    dp_rank: int
    dp_size: int
    before: Held
    gradient: Held


def score(run: Config) -> Scored:
    """One update by plain SGD; the gradient is read where the optimizer found it."""
    trainer = build(run)
    own = share(BATCH, trainer)
    log_probs, before = trainer.log_probs(own).log_probs, held(trainer)
    assert not trainer.train_step(own).skipped
    parameters: dict[str, Any] = trainer._parameters
    gradient = {name: p.main_grad.cpu().numpy() for name, p in parameters.items()}
    where = trainer.where.dp_rank, trainer.where.dp_size
    return Scored(log_probs, *where, before, Held(gradient, trainer.layout()))


def sft_loss(sequence: TrainSequence, log_probs: Tensor, entropy: Tensor) -> Tensor:
    return -(torch.from_numpy(sequence.loss_weights) * log_probs)[1:].sum()


def errors(ranks: Ranks, name: str, world: int, megatron: dict[str, Any]) -> tuple[float, float]:
    """Of log-probs, in their standard deviations, and of the gradient, in its norm, against transformers in fp32 with
    the same weights. The weights have to be the checkpoint's, bit by bit."""
    results: list[Scored] = ranks.run(world, score, config(name, megatron | PLAIN_SGD, **BF16, **SFT))
    stored = load_file(tiny.checkpoint(name) / "model.safetensors")
    for tensor, value in whole_weights(name, [r.before for r in results]).items():
        np.testing.assert_array_equal(value, stored[tensor].bfloat16().float().numpy(), err_msg=tensor)

    model = tiny.build(name, torch.bfloat16).float()
    with torch.no_grad():
        scores = [oracle_scores(model, s.tokens)[0].numpy() * (s.loss_weights != 0) for s in BATCH]
    expected, actual = np.concatenate(scores), np.concatenate(unshare(BATCH, results))
    scored = expected != 0
    off, spread = actual[scored] - expected[scored], expected[scored].std()

    _, gradient = oracle_gradient(name, BATCH, sft_loss, dtype=torch.bfloat16)
    ours = whole_weights(name, [r.gradient for r in results])
    apart = np.sqrt(sum(((ours[tensor] - g) ** 2).sum() for tensor, g in gradient.items()))
    size = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    return float(np.sqrt((off**2).mean()) / spread), float(apart / size)


@pytest.mark.parametrize(
    ("world", "name", "megatron"),
    [
        pytest.param(1, "wide", {}, marks=needs(1)),
        pytest.param(1, "wide", RECOMPUTE, marks=needs(1)),
        pytest.param(1, "wide-all-experts", {}, marks=needs(1)),
        pytest.param(2, "wide", TP2 | SP, marks=needs(2)),
        pytest.param(2, "wide", PP2, marks=needs(2)),
        pytest.param(2, "wide", CP2, marks=needs(2)),
        pytest.param(2, "wide-all-experts", EP2, marks=needs(2)),
    ],
)
def test_bf16(ranks: Ranks, world: int, name: str, megatron: dict[str, Any]) -> None:
    """Errs no more than the local layers, which round as often; a fifth more is chance."""
    local, fast = (errors(ranks, name, world, megatron | impl) for impl in ({}, TE))
    measured(
        f"{name}, bf16, {megatron}", {"local log-probs": local[0], "TE": fast[0], "gradient": local[1], "TE's": fast[1]}
    )
    assert fast[0] <= 1.2 * local[0]
    assert fast[1] <= 1.2 * local[1]


@pytest.mark.parametrize(
    ("world", "megatron"),
    [
        pytest.param(1, {}, marks=needs(1)),
        pytest.param(1, {"fp8_recipe": "tensorwise"}, marks=needs(1)),
        pytest.param(1, RECOMPUTE, marks=needs(1)),
        pytest.param(2, TP2 | SP, marks=needs(2)),
        pytest.param(2, PP2, marks=needs(2)),
        pytest.param(2, CP2, marks=needs(2)),
    ],
)
def test_fp8(ranks: Ranks, world: int, megatron: dict[str, Any]) -> None:
    log_probs, gradient = errors(ranks, "wide", world, megatron | FP8)
    measured(f"wide, FP8, {megatron}", {"log-probs": log_probs, "gradient": gradient})
    assert FP8_PRODUCT <= log_probs <= GAIN * FP8_LOG_PROBS  # less would be bf16
    assert FP8_PRODUCT <= gradient <= GAIN * FP8_GRADIENT


@needs(1)
@pytest.mark.parametrize(
    ("name", "megatron", "tolerance"),
    [("wide", TE, 2**-7), ("wide-experts", TE, 2**-7), ("wide", FP8, FP8_PRODUCT)],
    ids=["bf16", "experts", "fp8"],
)
def test_training(ranks: Ranks, name: str, megatron: dict[str, Any], tolerance: float) -> None:
    """The batch is learnt as fast: the loss summed over the steps, because its end, near zero, is chance."""
    adam = {"lr": 1e-3, "weight_decay": 0.0}
    local, fast = (
        np.asarray(ranks.run(1, losses, config(name, table | adam, **BF16, **SFT), BATCH, 8, 2)[0])
        for table in ({}, megatron)
    )
    measured(f"losses, {name}, {megatron}", {"local": str(local.round(4)), "TE": str(fast.round(4))})
    assert fast[-1] < 0.1 * fast[0]
    assert fast.sum() == pytest.approx(local.sum(), rel=tolerance)


def reproducible_history(*args: Any) -> list[tuple[float, float]]:
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # of the attention's backward pass
    return history(*args)


@needs(1)
@pytest.mark.parametrize("megatron", [TE, FP8], ids=["bf16", "fp8"])
def test_resume(ranks: Ranks, tmp_path: Path, megatron: dict[str, Any]) -> None:
    run = config("wide", megatron | {"lr": 1e-3}, **BF16, **SFT)
    folder = str(tmp_path / "checkpoint")
    uninterrupted = ranks.run(1, reproducible_history, run, folder, 6, False, 3)[0]
    assert ranks.run(1, reproducible_history, run, folder, 3, True)[0] == uninterrupted[3:]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As that of test_grpo, with a model that FP8 can multiply."""
    folder = tmp_path_factory.mktemp("wide-quickstart")
    with pytest.MonkeyPatch.context() as patch:
        for key in ("hidden_size", "intermediate_size", "head_dim"):
            patch.setitem(checkpoint.CONFIG, key, WIDE[key])
        build_assets(folder / "assets")
    files = f"model.hf_checkpoint={folder}/assets/model", f"data.prompt_data={folder}/assets/sft.jsonl"
    train(SFT_RECIPE, folder, "sft", 1, *files, *overrides(TE), "megatron.lr=2e-3", "run.num_rollout=300")
    return folder


def overrides(megatron: dict[str, Any]) -> list[str]:
    return ["model.dtype=bfloat16", *(f"megatron.{key}={value}" for key, value in megatron.items())]


@needs(1)
@pytest.mark.parametrize(("megatron", "mean"), [(TE, 0.02), (FP8, FP8_PRODUCT * 4)], ids=["bf16", "fp8"])
def test_grpo_learns(warm: Path, megatron: dict[str, Any], mean: float) -> None:
    """With the engine in the same process."""
    steps, name = 30, f"grpo-{len(megatron)}"
    metrics = grpo(warm, name, 1, steps, *overrides(megatron))
    rewards, scores = series(metrics, "rollout/raw_reward"), series(metrics, "eval/heldout")
    largest, apart = (series(metrics, f"train/train_rollout_logprob_abs_diff{kind}") for kind in ("_max", ""))
    measured(
        f"GRPO of a wide quickstart, {megatron}",
        {
            "reward, first 5 steps": statistics.mean(rewards[:5]),
            "reward, last 5 steps": statistics.mean(rewards[-5:]),
            "held out, before": scores[0],
            "held out, after": scores[-1],
            "largest |engine - trainer| log-prob": max(largest),
            "mean |engine - trainer| log-prob": statistics.mean(apart),
            "step, s": statistics.median(series(metrics, "perf/step_time")[5:]),
        },
    )
    assert len(rewards) == steps
    assert scores[-1] > scores[0] + 0.2
    assert 0 < statistics.mean(apart) < mean
    assert set(series(metrics, "refit/checksum_mismatches")) == {0.0}
