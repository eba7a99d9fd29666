"""SGLang's model of a family: which of SGLang's files has it, and what it takes from the family's blocks.

SGLang reads config.json by itself, and ignores what its classes do not know: a window, for example, in Mistral's. What
a block says is therefore written into the built model, or compared with it.
"""

from __future__ import annotations

import os
import pkgutil
from dataclasses import replace
from importlib import import_module
from typing import Any

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.radix_attention import RadixAttention
from torch.nn import Module

from miles_spmd.models import Family, TensorLayout
from miles_spmd.models.blocks import Attention, Mixture
from miles_spmd.models.blocks.experts import Experts, Router


def register(family: Family) -> None:
    """Make SGLang know the classes of ``family`` alone: it would import its 200 model files, which takes seconds."""
    from sglang.srt import models

    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(
        module.name for module in pkgutil.iter_modules(models.__path__)
    )
    from sglang.srt.models.registry import ModelRegistry

    entry = import_module(f"sglang.srt.models.{family.sglang_module or family.model_type}").EntryClass
    ModelRegistry.models |= {kind.__name__: kind for kind in (entry if isinstance(entry, list) else [entry])}


def adopt(model: Module, family: Family) -> None:
    """Write what the blocks of ``family`` say about attention into the ``model`` that SGLang has built.

    Raises ValueError where the model is another one than the blocks describe.
    """
    for number, layer in enumerate(family.layers):
        module: Any = model.model.layers[number].self_attn  # type: ignore[union-attr, operator, index]
        _adopt_attention(module.attn, layer.attention, f"layer {number}")


def compare_experts(model: Module, family: Family) -> None:
    """Raise ValueError where the routers and experts of the ``model`` that SGLang has built, which
    :func:`~miles_spmd.generation.sglang.expert_layers.describe` has described, are not those of the blocks."""
    for number, layer in enumerate(family.layers):
        parts = list(model.model.layers[number].modules())  # type: ignore[union-attr, operator, index]
        forms = [part.form for part in parts if isinstance(part, TopK | FusedMoE)]
        # in an engine of fp32 no dtype of logits is another one
        found = [replace(form, logit_dtype="model") if isinstance(form, Router) else form for form in forms]
        expected: list[Router | Experts] = []
        if isinstance(layer.mlp, Mixture):
            expected = [replace(layer.mlp.router, logit_dtype="model"), layer.mlp.form]
        if sorted(found, key=repr) != sorted(expected, key=repr):
            raise ValueError(f"layer {number}: SGLang has the experts {found}, and the family's blocks {expected}")


def require_all_tensors(layouts: list[TensorLayout], family: Family) -> None:
    """Raise ValueError where no parameter of SGLang's model, whose ``layouts`` these are, has a tensor of the
    checkpoint: it would compute without it. To be asked on an engine's first rank, which has the first rows of
    everything but routed experts."""
    held = {piece.name for layout in layouts for piece in layout.pieces} | {layout.local_name for layout in layouts}
    absent = [name for name in family.checkpoint_tensors() if name not in held and ".experts." not in name]
    if absent:
        raise ValueError(f"SGLang's model of this {family.model_type} checkpoint has no {', '.join(absent)}")


def _adopt_attention(module: RadixAttention, block: Attention, where: str) -> None:
    found, expected = (module.head_dim, module.scaling), (block.head_dim, block.score_scale)
    if found != expected:
        raise ValueError(
            f"{where}: SGLang's attention has head_dim and scale {found}, the family's blocks {expected}; the family "
            "reads config.json in another way than SGLang does"
        )
    module.sliding_window_size = block.window - 1 if block.window else -1  # keys before the query's own
    module.logit_cap = block.softcap
