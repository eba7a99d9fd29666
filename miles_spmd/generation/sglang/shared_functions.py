"""SGLang's layers, computing with :mod:`miles_spmd.invariant`, with which the trainer computes too.

SGLang has a batch-invariant mode of its own, which replaces torch's matrix products in the whole process, the trainer's
with them, and falls back to unfused norms. Here the layers of one engine call other functions instead; of SGLang's mode
is left that attention does not split keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from typing import Any

from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.utils import MultiPlatformOp
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models import qwen3_moe
from torch import Tensor

from miles_spmd.invariant import experts
from miles_spmd.invariant.linear import linear, tree_sum
from miles_spmd.invariant.norm import add_rms_norm, rms_norm
from miles_spmd.invariant.rotary import rotate
from miles_spmd.invariant.swiglu import swiglu

_dispatch = MultiPlatformOp.dispatch_forward
_their_all_reduce = GroupCoordinator.all_reduce
_apply = UnquantizedLinearMethod.apply
_compute_lm_head = LogitsProcessor._compute_lm_head
_rotary_stores_keys = qwen3_moe.enable_fused_set_kv_buffer
_enable_mode = ModelRunner.maybe_enable_batch_invariant_mode


@contextlib.contextmanager
def shared_kernels(wanted: bool, terms: int) -> Iterator[None]:
    """An engine built meanwhile computes with the functions that the trainer calls, or with SGLang's own. ``terms``: of
    what its ranks add up."""
    UnquantizedLinearMethod.apply = partialmethod(_linear, terms) if wanted else _apply
    GroupCoordinator.all_reduce = _all_reduce if wanted else _their_all_reduce
    LogitsProcessor._compute_lm_head = _lm_head if wanted else _compute_lm_head
    ModelRunner.maybe_enable_batch_invariant_mode = _leave_torch_alone if wanted else _enable_mode
    qwen3_moe.enable_fused_set_kv_buffer = _no if wanted else _rotary_stores_keys
    MultiPlatformOp.dispatch_forward = _shared if wanted else _dispatch
    try:
        yield
    finally:
        MultiPlatformOp.dispatch_forward = _dispatch


def _leave_torch_alone(runner: ModelRunner) -> None: ...


def _no(batch: Any) -> bool:
    """The rotary layer does not write keys and values into the cache; attention does."""
    return False


def _shared(layer: MultiPlatformOp) -> Callable[..., Any]:
    if type(layer) is RMSNorm:
        return partial(_norm, layer)
    if type(layer) is SiluAndMul:
        return swiglu
    if type(layer) is TopK:
        return partial(_choose, layer)
    if type(layer) is UnquantizedFusedMoEMethod:
        return _mix
    return partial(_rotate, layer) if isinstance(layer, RotaryEmbedding) else _dispatch(layer)


def _norm(layer: RMSNorm, x: Tensor, residual: Tensor | None = None, post_residual_addition: None = None) -> Any:
    if residual is None:
        return rms_norm(x, layer.weight, layer.variance_epsilon)
    return add_rms_norm(x, residual, layer.weight, layer.variance_epsilon)


def _rotate(
    layer: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor, fused_set_kv_buffer_arg: Any = None
) -> tuple[Tensor, Tensor]:
    if fused_set_kv_buffer_arg is not None:
        raise RuntimeError("SGLang expects its rotary layer to fill the cache of keys, which this one does not do")
    turned = [
        rotate(x.view(len(x), -1, layer.head_size), layer.cos_sin_cache, positions).flatten(1) for x in (query, key)
    ]
    return turned[0], turned[1]


def _linear(method: UnquantizedLinearMethod, terms: int, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    own = max(1, terms // layer.tp_size) if isinstance(layer, RowParallelLinear) else 1
    return linear(x, layer.weight, bias, own)


def _all_reduce(group: GroupCoordinator, x: Tensor) -> Tensor:
    if group.world_size <= 2 or group.world_size.bit_count() > 1:  # but one order, or no parity
        return _their_all_reduce(group, x)
    return tree_sum(group.all_gather(x.unsqueeze(0), 0).unbind())


def _lm_head(processor: LogitsProcessor, hidden: Tensor, head: Any, *_: Any) -> Tensor:
    return linear(hidden, head.weight)


def _choose(layer: TopK, hidden_states: Tensor, router_logits: Tensor, **_: Any) -> StandardTopKOutput:
    config = layer.topk_config
    weights, chosen = experts.choose(router_logits, config.top_k, not config.renormalize)
    return StandardTopKOutput(weights, chosen, router_logits)


def _mix(layer: Any, dispatch_output: StandardDispatchOutput) -> StandardCombineInput:
    """Of the experts that this rank has."""
    weights, chosen, _ = dispatch_output.topk_output
    mixed = experts.mix(dispatch_output.hidden_states, chosen, weights, layer.w13_weight, layer.w2_weight)
    return StandardCombineInput(mixed)
