"""The GPUs there are, what engines are told on them, and what was measured."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from miles_spmd.telemetry.environment import gpus

COUNT = len(gpus())

# Triton's attention computes in fp32, too. Few CUDA graphs: capturing one takes longer than most tests use it.
ENGINE: dict[str, Any] = {
    "attention_backend": "triton",
    "cuda_graph_bs_decode": [1, 8, 64, 512],
    "mem_fraction_static": 0.3,
}

MEASURED: list[str] = []


def needs(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(count > COUNT, reason=f"needs {count} GPUs, there are {COUNT}")


needs_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


def measured(what: str, numbers: dict[str, Any]) -> None:
    """Show ``numbers`` when all tests have run."""
    width = max(map(len, numbers))
    MEASURED.append(what)
    MEASURED.extend(
        f"  {name:<{width}} {value:.4g}" if isinstance(value, float) else f"  {name:<{width}} {value}"
        for name, value in numbers.items()
    )
