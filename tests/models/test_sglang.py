"""Our layouts of SGLang's parameters against SGLang's own weight loader, in SGLang's own models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miles_spmd.checkpoint import hf
from miles_spmd.models import load_family
from tests.models import tiny
from tests.ranks import Ranks


def compare_loaders(folder: Path, tp_size: int, dtype: str) -> int:
    from miles_spmd.rollout.sglang_engine import SglangEngine

    engine = SglangEngine(folder, dtype=dtype, server_args={"tp_size": tp_size})
    try:
        engine._model.load_weights(load_file(folder / "model.safetensors").items())
        expected = {name: tensor.clone() for name, tensor in engine.weights().items()}
        for tensor in engine.weights().values():
            tensor.fill_(torch.nan)
        hf.load(folder, engine.weights(), engine.layout(), load_family(folder))
        for name, tensor in engine.weights().items():
            assert torch.equal(tensor, expected[name]), name
        return sum(tensor.numel() for tensor in expected.values())
    finally:
        engine.close()


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_parameter_is_what_sglang_loads(ranks: Ranks, name: str, tp_size: int) -> None:
    dtype = "bfloat16" if tp_size == 2 else "float32"
    held = ranks.run(tp_size, compare_loaders, tiny.checkpoint(name), tp_size, dtype)
    assert sum(held) >= load_family(tiny.checkpoint(name)).num_parameters()
