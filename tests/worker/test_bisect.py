"""One bit of one of the trainer's weights is turned: the operator that multiplies by it is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from miles_spmd.config import Config
from miles_spmd.protocol.commands import Bisect
from miles_spmd.protocol.results import Bisection
from tests.generation.conformance import request
from tests.invariant.side_by_side import checkpoint
from tests.ranks import Ranks
from tests.training.cases import PP2, TP2

PLANTED = {
    "embedding.word_embeddings.weight": "embedding",
    "decoder.layers.0.input_layernorm.weight": "layer 0, input norm",
    "decoder.layers.1.self_attention.linear_qkv.weight": "layer 1, query, key and value",
    "decoder.layers.1.self_attention.k_layernorm.weight": "layer 1, key norm",
    "decoder.layers.2.mlp.linear_fc1.weight": "layer 2, gate and up projection",
    "decoder.final_layernorm.weight": "final norm",
    "output_layer.weight": "",
}
SUMMED = {  # over the ranks of a tensor-parallel group; the engine adds the sum to the stream in its next norm
    "decoder.layers.0.self_attention.linear_proj.weight": ("layer 0, output projection", "layer 0, MLP norm"),
    "decoder.layers.2.mlp.linear_fc2.weight": ("layer 2, down projection", "layer 3, input norm"),
}


PLANTED_IN_EXPERTS = {
    "decoder.layers.1.mlp.router.weight": "layer 1, router",
    "decoder.layers.2.mlp.experts.down": "layer 2, experts",
}


def named(run: Config, weights: tuple[str, ...]) -> dict[str, Bisection]:
    """What is named after a bit of each of this rank's weights has changed, one after another; "nothing": before."""
    from miles_spmd.algorithms.losses import make_loss
    from miles_spmd.models import load_family
    from miles_spmd.training.trainer import Trainer
    from miles_spmd.weights.refit import Refit
    from miles_spmd.worker.worker import bisect, make_engine

    trainer = Trainer(run, load_family(run.model.hf_checkpoint), make_loss("rl", run.algorithm))
    engine = make_engine(run)
    try:
        Refit(trainer.weights(), trainer.layout(), engine.weights(), engine.layout(), bucket_bytes=1 << 20).run()
        engine.commit(0)
        wanted = Bisect(request("0.0", list(range(20)), seed=3, ignore_eos=True, max_new_tokens=12), 26)
        found = {"nothing": bisect(wanted, engine, trainer)}
        for name in weights:
            weight = trainer.weights().get(name, torch.zeros(0))
            weight.view(torch.int32)[..., :8] ^= 1 << 16
            found[name] = bisect(wanted, engine, trainer)
            weight.view(torch.int32)[..., :8] ^= 1 << 16
    finally:
        engine.close()
    return found


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, PP2), (2, TP2)], ids=["one", "PP2", "TP2"])
def test_the_operator_is_named(ranks: Ranks, tmp_path: Path, size: int, layout: dict[str, int]) -> None:
    tp_size = layout.get("tensor_model_parallel_size", 1)
    run = Config(
        model={"hf_checkpoint": checkpoint(tmp_path, "qwen3"), "dtype": "float32"},
        data={"prompt_data": "none"},
        megatron=layout,
        determinism={"parity": "bitwise"},
        sglang={"context_length": 64, "tp_size": tp_size},
    )
    expected = {"nothing": ""} | PLANTED | {name: names[tp_size > 1] for name, names in SUMMED.items()}
    compare(ranks.run(size, named, run, (*PLANTED, *SUMMED)), expected)


def test_the_operator_of_experts_is_named(ranks: Ranks, tmp_path: Path) -> None:
    run = Config(
        model={"hf_checkpoint": checkpoint(tmp_path, "qwen3_moe"), "dtype": "float32"},
        data={"prompt_data": "none"},
        determinism={"parity": "bitwise"},
        sglang={"context_length": 64},
    )
    compare(ranks.run(1, named, run, (*PLANTED_IN_EXPERTS,)), {"nothing": ""} | PLANTED_IN_EXPERTS)


def compare(of_ranks: list[dict[str, Bisection]], expected: dict[str, str]) -> None:
    for name, operator in expected.items():
        found = [of_rank[name] for of_rank in of_ranks if of_rank[name].operator]
        first = min(found, key=lambda answer: answer.order, default=None)  # later ranks get what earlier ones have
        assert (first.operator if first else "") == operator, name
        assert not first or "tokens, first for number" in first.what
