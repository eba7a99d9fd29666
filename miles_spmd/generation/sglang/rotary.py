"""SGLang's rotary layers with the tables of the trainer.

SGLang computes tables of its own, from what its model files read of a config.json: some ignore a parameter there, some
kinds have other numbers than in transformers, and one depends on the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.model_runner import ModelRunner
from torch.nn import Module

from miles_spmd.invariant.rope import frequencies, rotary_table
from miles_spmd.models import Family
from miles_spmd.models.family import SGLANG_LAYER
from miles_spmd.models.hf_config import rope_parameters
from miles_spmd.models.rope import Rope

# Places behind the context: SGLang starts another step of requests before it knows that they have ended.
_SPARE = 256

_load_model = ModelRunner.load_model


@contextlib.contextmanager
def own_tables(family: Family, context: int) -> Iterator[None]:
    """The layers of an engine constructed inside this context have the rotary positions of ``family``, for sequences of
    up to ``context`` tokens. Its construction raises ValueError as :func:`install` does."""

    def load(runner: ModelRunner) -> None:
        _load_model(runner)
        install(runner.model, family, context, torch.device(runner.device))

    ModelRunner.load_model = load
    try:
        yield
    finally:
        ModelRunner.load_model = _load_model


def install(model: Module, family: Family, context: int, device: torch.device) -> None:
    """Replace the rotary module of every layer by one with our table; layers whose positions are equal share it.

    SGLang's modules are left as they are: it has them in a cache from which the next engine of this process would get
    them. Raises ValueError for a layer whose module rotates other dimensions or in other pairs than ``family`` says.
    """
    modules: dict[tuple[Rope, int], RotaryEmbedding] = {}
    seen = set()
    for name, attention in model.named_modules():
        place = SGLANG_LAYER.match(name + ".")
        if place is None or (layer := attention._modules.get("rotary_emb")) is None:
            continue
        seen.add(number := int(place[1]))
        rope = family.layers[number].attention.rope
        if rope is None:
            raise ValueError(f"SGLang's {name} rotates queries and keys, and this model has no positions there")
        _compare(name, layer, rope)
        key = rope, layer.head_size
        if key not in modules:
            modules[key] = _module(rope, layer, context, device)
        attention.rotary_emb = modules[key]
    if without := [str(n) for n, block in enumerate(family.layers) if block.attention.rope and n not in seen]:
        raise ValueError(f"SGLang's layers {', '.join(without)} have no rotary positions, which this model requires")


def overrides(family: Family) -> dict[str, Any]:
    """Return what has to be set in the configuration that SGLang builds its layers from: the partial rotary factor,
    which some of its model files look for at the top level only, and a linear factor, which must be a float there."""
    rope = rope_parameters(family.config)
    changed: dict[str, Any] = {}
    if family.config.get("partial_rotary_factor", 1) != rope["partial_rotary_factor"]:
        changed["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] == "linear" and isinstance(rope["factor"], int):
        changed["rope_parameters"] = rope | {"factor": float(rope["factor"])}
    return changed


def _compare(name: str, layer: Any, rope: Rope) -> None:
    width, neighbours = layer.rotary_dim, not getattr(layer, "is_neox_style", True)
    table = getattr(layer, "cos_sin_cache", None)
    if (width, neighbours) != (rope.rotary_dim, rope.interleaved) or (table is not None and table.shape[-1] != width):
        raise ValueError(
            f"SGLang's {name} rotates {_pairs(width, neighbours)}, and this model has "
            f"{_pairs(rope.rotary_dim, rope.interleaved)}; set sglang.json_model_override_args to what SGLang does not "
            "find in config.json"
        )


def _pairs(width: int, neighbours: bool) -> str:
    return (
        f"{width} dimensions in pairs of neighbours"
        if neighbours
        else f"{width} dimensions in pairs {width // 2} apart"
    )


def _module(rope: Rope, layer: Any, context: int, device: torch.device) -> RotaryEmbedding:
    dtype = getattr(layer, "dtype", torch.float32)
    module = RotaryEmbedding(layer.head_size, rope.rotary_dim, 1, rope.theta, not rope.interleaved, dtype)
    # Not a buffer: SGLang copies buffers whenever it releases weights, and this table is not released with them.
    del module.cos_sin_cache
    steps = frequencies(rope, context).to(device)
    module.cos_sin_cache = rotary_table(steps, context + _SPARE, rope.attention_factor)
    return module
