"""Whole layers of experts: SGLang's and the trainer's are bitwise equal on every layout, and transformers' are near."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_spmd.platform import cpu

cpu.install()

from tests.invariant import moe_blocks  # noqa: E402
from tests.ranks import Ranks  # noqa: E402
from tests.training.cases import EP2, ETP1, SP, TP2  # noqa: E402

TP4, EP4 = {"tensor_model_parallel_size": 4}, {"expert_model_parallel_size": 4}
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]}
LAYOUTS = {
    "1-1": (1, {}, 1),
    "EP2-1": (2, EP2, 1),
    "DP2-2": (2, {}, 2),
    "DP2-2, recomputed": (2, RECOMPUTED, 2),
    "TP2+SP+EP2-1": (2, TP2 | SP | EP2 | ETP1, 1),
    "TP2+SP+EP2-2": (2, TP2 | SP | EP2 | ETP1, 2),
    "TP2+SP+EP4-4": (4, TP2 | SP | EP4 | ETP1, 4),
    "TP4+SP+EP4-2": (4, TP4 | SP | EP4 | ETP1, 2),
}


FAST = ("1-1", "TP2+SP+EP2-2")


@pytest.mark.parametrize("layout", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LAYOUTS])
@pytest.mark.parametrize("name", moe_blocks.kinds())
def test_layers(ranks: Ranks, tmp_path: Path, name: str, layout: str) -> None:
    world, megatron, engine = LAYOUTS[layout]
    folder = moe_blocks.write_config(tmp_path)
    for found in ranks.run(world, moe_blocks.compare, name, folder, megatron, engine):
        assert (found.mismatches, found.batches) == (0, 0)
        assert max(found.errors.values()) < 2e-6, found.errors


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(1, {}, id="1", marks=pytest.mark.slow),
        pytest.param(2, EP2, id="EP2", marks=pytest.mark.slow),
        pytest.param(2, TP2 | SP, id="TP2+SP+ETP2"),
    ],
)
@pytest.mark.parametrize("name", moe_blocks.kinds())
def test_without_parity(ranks: Ranks, name: str, world: int, layout: dict[str, object]) -> None:
    """Where ranks have parts of an expert's width, biases of its second layer are added once."""
    for errors in ranks.run(world, moe_blocks.errors_of, name, layout):
        assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("name", moe_blocks.kinds())
def test_engines_that_split_experts(ranks: Ranks, tmp_path: Path, name: str) -> None:
    for error in ranks.run(2, moe_blocks.error_of_split_experts, name, moe_blocks.write_config(tmp_path)):
        assert error < 2e-6
