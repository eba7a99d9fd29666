"""A model whose router has what no gradient trains: a correction bias is loaded, kept in fp32, saved and never
updated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from miles_spmd.algorithms.losses import make_loss
from miles_spmd.config import Config
from miles_spmd.models.blocks import Mixture
from miles_spmd.models.blocks.experts import CORRECTION_BIAS, Experts, Router
from miles_spmd.models.families.qwen import Qwen3Moe
from miles_spmd.training.trainer import Trainer
from tests.models import tiny
from tests.ranks import Ranks
from tests.training.cases import EP2, ETP1, SP, TP2, ZERO, config, save, sequences, share

ADAM = {"lr": 1e-2, "clip_grad": 1.0}


class Biased(Qwen3Moe):
    """The tiny model with sigmoid scores, groups, a scale and a correction bias, which the checkpoint does not have."""

    def mlp(self, number: int) -> Mixture:
        sigmoid = {"scores": "sigmoid", "bias": True, "normalize": True, "scale": 2.0, "logit_dtype": "fp32"}
        grouped = {"groups": 2, "groups_per_token": 1, "best_of_group": 2}
        plain = self.mixture()
        return replace(plain, router=Router(plain.num_experts, plain.router.per_token, **sigmoid, **grouped))


def with_biases(folder: Path, dtype: torch.dtype) -> Path:
    """Write the tiny checkpoint with correction biases that bf16 could not hold."""
    from safetensors.torch import load_file, save_file

    tiny.save(folder, "qwen3_moe", dtype)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for layer in range(tiny.COMMON["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.mlp.gate.{CORRECTION_BIAS}"] = torch.tensor([0.1, 0.2, 0.3, 1.001])
    save_file(tensors, file, {"format": "pt"})
    return folder


def trained(run: Config, folder: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Make an update, save, make another one; load, and make it again. Return correction biases and what went wrong."""
    trainer = Trainer(run, Biased(tiny.build("qwen3_moe").config.to_dict()), make_loss("sft", run.algorithm))
    batch = share(sequences([12, 7, 20, 9]), trainer)
    biases = {name: value for name, value in trainer.weights().items() if name.endswith("router.expert_bias")}
    problems = [f"{name} is {value.dtype}" for name, value in biases.items() if value.dtype is not torch.float32]
    trainer.train_step(batch)
    trainer.digests.gradient()  # has no part for a bias
    digests = save(trainer, Path(folder))
    trainer.train_step(batch)
    expected = {name: value.clone() for name, value in trainer.weights().items()}
    for value in biases.values():
        value.fill_(-1)
    trainer.checkpoint.load(folder, digests)
    trainer.train_step(batch)
    for name, value in trainer.weights().items():
        problems += [] if torch.equal(value, expected[name]) else [f"{name} is not what it was"]
    return {name: value.clone() for name, value in biases.items()}, problems


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("world", "layout"), [(1, {}), (2, EP2 | ZERO), (2, TP2 | SP | EP2 | ETP1)], ids=["1", "EP2+ZeRO", "TP2+SP+EP2"]
)
def test_a_bias_is_kept(ranks: Ranks, tmp_path: Path, world: int, layout: dict[str, Any], dtype: str) -> None:
    source = with_biases(tmp_path / "source", getattr(torch, dtype))
    run = config(
        "qwen3_moe",
        layout | ADAM,
        model={"hf_checkpoint": str(source), "dtype": dtype},
        run={"mode": "sft"},
        determinism={"ledger": True},
    )
    for biases, problems in ranks.run(world, trained, run, str(tmp_path / "saved")):
        assert not problems
        assert len(biases) == tiny.COMMON["num_hidden_layers"]
        for bias in biases.values():
            assert torch.equal(bias, torch.tensor([0.1, 0.2, 0.3, 1.001]))


class Interleaved(Qwen3Moe):
    def mlp(self, number: int) -> Mixture:
        return replace(self.mixture(), form=Experts(interleaved=True))


def test_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_spmd.training.megatron_config import build_megatron_config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = config("qwen3_moe", {"transformer_impl": "transformer_engine"})
    values = tiny.build("qwen3_moe").config.to_dict()
    for family in (Biased(values), Interleaved(values)):
        with pytest.raises(ValueError, match="has another router or other experts"):
            build_megatron_config(run, family)
