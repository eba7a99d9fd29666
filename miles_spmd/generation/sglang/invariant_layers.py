"""SGLang's layers, computing with :mod:`miles_spmd.invariant` as the trainer's do.

SGLang's own batch-invariant mode replaces torch's matrix products in the whole process, including the trainer's, and
falls back to unfused norms. Here the layers of one engine call other functions instead; the only part of SGLang's mode
that remains in use is that attention does not split keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from typing import Any

import torch
from sglang.jit_kernel.clamp_position import _jit_clamp_position_module
from sglang.jit_kernel.kvcache import can_use_store_cache
from sglang.srt.batch_invariant_ops import batch_invariant_ops as ops
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.layers.activation import GeluAndMul, SiluAndMul
from sglang.srt.layers.layernorm import Gemma3RMSNorm, GemmaRMSNorm, RMSNorm
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.utils import MultiPlatformOp
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models import gemma3_causal, qwen2_moe, qwen3_moe
from torch import Tensor
from torch.nn import Module

from miles_spmd.generation.sglang import model_blocks
from miles_spmd.generation.sglang.compilation import Product, compile_beside, compile_products
from miles_spmd.generation.sglang.expert_layers import add_gated, describe, mix, route
from miles_spmd.invariant.linear import linear, tree_sum
from miles_spmd.invariant.operators import add_rms_norm, geglu, one_more, rms_norm, rotate, softcap, swiglu
from miles_spmd.models import Family

PREFILL_ROWS = 64  # DeepGEMM's choice of tiles depends on how many times so many rows a product has

_dispatch = MultiPlatformOp.dispatch_forward
_all_reduce = GroupCoordinator.all_reduce
_apply = UnquantizedLinearMethod.apply
_compute_lm_head = LogitsProcessor._compute_lm_head
_enable_fused_set_kv_buffer = qwen3_moe.enable_fused_set_kv_buffer
_of_gemma3 = gemma3_causal.Gemma3Attention.forward
_add_gated = qwen2_moe.fused_gate_sigmoid_mul_add
_enable_mode = ModelRunner.maybe_enable_batch_invariant_mode


@contextlib.contextmanager
def invariant_layers(enabled: bool, family: Family, sum_terms: int) -> Iterator[None]:
    """An engine of ``family`` constructed inside this context computes with the functions of the trainer, or unless
    ``enabled``, with SGLang's own. ``sum_terms``: number of partial sums when outputs of tensor-parallel ranks are
    reduced."""
    # Layers bind their function when they are constructed (dispatch_forward). The others look theirs up in every call,
    # so these stay after the context ends: a process has one engine at a time, and the next one sets them again.
    UnquantizedLinearMethod.apply = partialmethod(_linear, sum_terms) if enabled else _apply
    GroupCoordinator.all_reduce = _tree_all_reduce if enabled else _all_reduce
    LogitsProcessor._compute_lm_head = partialmethod(_lm_head, family.logit_softcap) if enabled else _compute_lm_head
    gemma3_causal.Gemma3Attention.forward = _gemma3_attention if enabled else _of_gemma3
    # SGLang calls it when the model is built, and memory for its cache is not taken yet.
    ModelRunner.maybe_enable_batch_invariant_mode = partialmethod(_model_is_built, enabled, family, sum_terms)
    # Keys and values are written into the cache by attention, not by the rotary layer.
    qwen3_moe.enable_fused_set_kv_buffer = (lambda batch: False) if enabled else _enable_fused_set_kv_buffer
    qwen2_moe.fused_gate_sigmoid_mul_add = add_gated if enabled else _add_gated
    MultiPlatformOp.dispatch_forward = _invariant if enabled else _dispatch
    try:
        yield
    finally:
        MultiPlatformOp.dispatch_forward = _dispatch


def _invariant(layer: MultiPlatformOp) -> Callable[..., Any]:
    """Return the function that ``layer`` computes with."""
    if type(layer) is RMSNorm:
        layer.forward_native = partial(_norm, layer)  # some models call it without asking what was dispatched
        return partial(_norm, layer)
    if type(layer) in (GemmaRMSNorm, Gemma3RMSNorm):
        return partial(_zero_centred_norm, layer)
    if type(layer) is SiluAndMul:
        return swiglu
    if type(layer) is GeluAndMul:
        return partial(_geglu, layer)
    if type(layer) is TopK:
        return partial(route, layer)
    if type(layer) is UnquantizedFusedMoEMethod:
        return mix
    return partial(_rotate, layer) if isinstance(layer, RotaryEmbedding) else _dispatch(layer)


def _norm(layer: RMSNorm, x: Tensor, residual: Tensor | None = None, post_residual_addition: None = None) -> Any:
    if residual is None:
        return rms_norm(x, layer.weight, layer.variance_epsilon)
    return add_rms_norm(x, residual, layer.weight, layer.variance_epsilon)


def _zero_centred_norm(
    layer: GemmaRMSNorm | Gemma3RMSNorm, x: Tensor, residual: Tensor | None = None, post_residual_addition: None = None
) -> Any:
    eps = layer.variance_epsilon if isinstance(layer, GemmaRMSNorm) else layer.eps
    if residual is None:
        return rms_norm(x, one_more(layer.weight), eps)
    return add_rms_norm(x, residual, one_more(layer.weight), eps)


def _geglu(layer: GeluAndMul, x: Tensor) -> Tensor:
    if layer.approximate != "tanh":
        raise RuntimeError(f"SGLang's layer has gelu {layer.approximate!r}, and the trainer tanh's approximation")
    return geglu(x)


def _gemma3_attention(
    layer: Any, positions: Tensor, hidden_states: Tensor, position_embeddings: Any, forward_batch: Any, **_: Any
) -> Tensor:
    """SGLang's own rotates by a function of its own."""
    qkv, _ = layer.qkv_proj(hidden_states)
    q, k, v = qkv.split([layer.q_size, layer.kv_size, layer.kv_size], -1)
    q, k = (norm(x.reshape(-1, layer.head_dim)).view(x.shape) for norm, x in ((layer.q_norm, q), (layer.k_norm, k)))
    q, k = layer.rotary_emb(positions.flatten(), q, k)
    output, _ = layer.o_proj(layer.attn(q, k, v, forward_batch=forward_batch))
    return output


def _rotate(
    layer: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor, fused_set_kv_buffer_arg: Any = None
) -> tuple[Tensor, Tensor]:
    if fused_set_kv_buffer_arg is not None:
        raise RuntimeError("SGLang expects its rotary layer to write the KV cache, which this one does not do")
    query, key = (
        rotate(x.view(len(x), -1, layer.head_size), layer.cos_sin_cache, positions, not layer.is_neox_style).view(
            x.shape
        )
        for x in (query, key)
    )
    return query, key


def _linear(
    method: UnquantizedLinearMethod, sum_terms: int, layer: Any, x: Tensor, bias: Tensor | None = None
) -> Tensor:
    return linear(x, layer.weight, bias, _partial_sums(layer, sum_terms))


def _partial_sums(layer: Any, sum_terms: int) -> int:
    """A row-parallel layer has a share of the hidden dimension; it computes its share of the partial sums."""
    return max(1, sum_terms // layer.tp_size) if isinstance(layer, RowParallelLinear) else 1


def _tree_all_reduce(group: GroupCoordinator, x: Tensor) -> Tensor:
    """Sum over ranks in a binary tree, whose reduction order is the trainer's for every number of ranks."""
    # Two numbers have one sum only; parity is supported for powers of two only.
    if group.world_size <= 2 or group.world_size.bit_count() > 1:
        return _all_reduce(group, x)
    return tree_sum(group.all_gather(x.unsqueeze(0), 0).unbind())


def _lm_head(processor: LogitsProcessor, cap: float, hidden: Tensor, head: Any, *_: Any) -> Tensor:
    logits = linear(hidden, head.weight)
    processor.final_logit_softcapping = None  # or SGLang would apply its own
    return softcap(logits, cap) if cap else logits


def _model_is_built(runner: ModelRunner, enabled: bool, family: Family, sum_terms: int) -> None:
    model_blocks.adopt(runner.model, family)
    if enabled:
        describe(runner.model)
        model_blocks.compare_experts(runner.model, family)
        _compile(runner, sum_terms)
    else:
        _enable_mode(runner)


def _compile(runner: ModelRunner, sum_terms: int) -> None:
    """Compile in parallel what the CUDA graphs of ``runner`` and its prefills need, and what SGLang compiles beside
    them. The micro-batches of training have the same products as prefills."""
    args = runner.server_args
    if args.device != "cuda" or args.disable_cuda_graph:
        return
    heads, width = runner.model_config.get_num_kv_heads(args.tp_size), runner.model_config.head_dim
    beside = compile_beside(
        [partial(can_use_store_cache, heads * width * 2), partial(_jit_clamp_position_module, torch.int64)]
    )
    if ops._ENABLE_MM_DEEPGEMM and ops.ENABLE_JIT_DEEPGEMM:
        batches = [size for size in args.cuda_graph_bs_decode if size <= (args.max_running_requests or size)]
        longest = args.chunked_prefill_size if args.chunked_prefill_size > 0 else args.max_prefill_tokens
        prefills = range(PREFILL_ROWS, longest + 1, PREFILL_ROWS)
        products = set()
        for layer in _multiplying(runner.model):
            (n, k), terms = layer.weight.shape, _partial_sums(layer, sum_terms)
            # the head multiplies a row of each request, other layers a row of each token
            rows = batches if isinstance(layer, VocabParallelEmbedding) else [*batches, *prefills]
            products |= {Product(count, n, k // terms) for count in rows}
        compile_products(products, torch.cuda.current_device())
    for thread in beside:
        thread.join()


def _multiplying(model: Module) -> Iterator[Any]:
    """Yield the layers whose weight is a factor of a matrix product in bfloat16; an embedding may be the head, too."""
    for layer in model.modules():
        if isinstance(getattr(layer, "quant_method", None), UnquantizedLinearMethod) or isinstance(
            layer, VocabParallelEmbedding
        ):
            yield layer
