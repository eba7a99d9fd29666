"""Our layouts of SGLang's parameters against SGLang's own weight loader, in SGLang's own models; and what mixtures of
experts generate with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miles_spmd.models import TensorLayout, load_family
from miles_spmd.models.layout import whole
from miles_spmd.weights import hugging_face
from tests.generation.checkpoints import Reference
from tests.generation.conformance import difference, refit, request, run
from tests.models import tiny
from tests.ranks import Ranks


def compare_loaders(folder: Path, tp_size: int, dtype: str) -> int:
    from miles_spmd.generation.sglang.engine import SglangEngine

    engine = SglangEngine(folder, dtype=dtype, server_args={"tp_size": tp_size})
    try:
        engine._model.load_weights(load_file(folder / "model.safetensors").items())
        expected = {name: tensor.clone() for name, tensor in engine.weights().items()}
        for tensor in engine.weights().values():
            tensor.fill_(torch.nan)
        hugging_face.load(folder, engine.weights(), engine.layout(), load_family(folder))
        for name, tensor in engine.weights().items():
            assert torch.equal(tensor, expected[name]), name
        return sum(tensor.numel() for tensor in expected.values())
    finally:
        engine.close()


# in bf16 on two ranks, which holds what one rank in fp32 does, and the shares of each
CASES = [(name, 2) for name in tiny.CONFIGS] + [(name, 1) for name in tiny.BY_HAND]


@pytest.mark.parametrize(("name", "tp_size"), CASES)
def test_every_parameter_is_what_sglang_loads(ranks: Ranks, name: str, tp_size: int) -> None:
    dtype = "bfloat16" if tp_size == 2 else "float32"
    held = ranks.run(tp_size, compare_loaders, tiny.checkpoint(name), tp_size, dtype)
    assert sum(held) >= load_family(tiny.checkpoint(name)).num_parameters()


def absent_tensors(folder: Path, absent: tuple[str, ...]) -> str:
    from miles_spmd.generation.sglang.model_blocks import require_all_tensors

    family = load_family(folder)
    layouts = [TensorLayout(name, whole(name, shape)) for name, shape in family.checkpoint_tensors().items()]
    require_all_tensors([layout for layout in layouts if ".experts.3." not in layout.local_name], family)
    with pytest.raises(ValueError, match="SGLang") as error:
        require_all_tensors([layout for layout in layouts if layout.local_name not in absent], family)
    return str(error.value)


def test_a_tensor_that_no_parameter_has(ranks: Ranks) -> None:
    names = "lm_head.weight", "model.layers.2.self_attn.q_norm.weight"
    (message,) = ranks.run(1, absent_tensors, tiny.checkpoint("qwen3_moe"), names)
    assert message == f"SGLang's model of this qwen3_moe checkpoint has no {', '.join(names)}"


def generate(folder: Path, tp_size: int) -> list[list[int]]:
    from miles_spmd.generation.sglang.engine import SglangEngine

    engine = SglangEngine(folder, dtype="float32", server_args={"tp_size": tp_size})
    try:
        refit(engine, folder, 0)
        asked = [request(f"r{i}", list(range(i, 3 * i + 2)), seed=i) for i in range(12)]
        outputs, reference = run(engine, asked), Reference(folder)
        for one in asked:
            assert difference(reference, one, outputs[one.rid]) < 1e-5, one
        return [outputs[one.rid].output_ids for one in asked]
    finally:
        engine.close()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_experts_generate(ranks: Ranks, tp_size: int) -> None:
    """What was drawn has the log-probs that transformers gives it, in float64; and every rank drew the same."""
    drawn = ranks.run(tp_size, generate, tiny.checkpoint("qwen3_moe"), tp_size)
    assert all(tokens == drawn[0] for tokens in drawn)
