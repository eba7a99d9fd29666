"""What stands in the way of an engine and a trainer that give a token the same log-prob, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from miles_spmd.config.rules import CONTRADICTIONS, NOT_BY_DEFAULT, PARITY, rule
from miles_spmd.models.attention import CAPABILITY, FLASH, FLASH_HEADS, SPLIT_KEYS, head_dim

RANKS = 1, 2, 4  # of which sums over the hidden dimension were shown to be the same
VECTOR = 32  # numbers that a CPU takes at a time: SGLang rounds each rank's part of an MLP up to a multiple there
LONG = 4096  # tokens of a sequence whose keys a GPU reads in one piece, or a few, at a price that shows
SHARED = FLASH, SPLIT_KEYS, "torch_native"  # the last on CPUs


@rule(PARITY)
def _something_to_compare(mode: str) -> Iterator[str]:
    if mode != "rl":
        yield f"run.mode: parity is of tokens that an engine generates and a trainer learns from; {mode!r} has none"


@rule(PARITY)
def _same_bits_in_any_batch(dtype: str, attention_backend: str | None, capabilities: frozenset[str]) -> Iterator[str]:
    device, wanted = ("GPU", "bfloat16") if capabilities else ("CPU", "float32")
    if dtype != wanted:
        yield f"model.dtype: parity needs {wanted!r} on a {device}; products in {dtype!r} depend on the batch there"
    if capabilities and attention_backend == "torch_native":
        yield "sglang.attention_backend: parity needs 'fa3' or 'triton' on a GPU; left out, it takes the one that fits"
    found = ", ".join(sorted(capabilities))
    if len(capabilities) > 1:
        yield f"determinism.parity: must be 'off' on GPUs of several compute capabilities ({found}), which round apart"
    elif attention_backend == FLASH and capabilities - {CAPABILITY}:
        yield (
            f"sglang.attention_backend: on GPUs of compute capability {found} parity needs 'triton', its default; "
            f"FlashAttention 3 needs {CAPABILITY}"
        )


@rule(PARITY)
def _same_attention(
    attention_backend: str | None,
    prefill_attention_backend: str | None,
    decode_attention_backend: str | None,
    kv_cache_dtype: str,
) -> Iterator[str]:
    if attention_backend not in (None, *SHARED):
        yield (
            f"sglang.attention_backend: parity needs 'fa3' or 'triton'; {attention_backend!r} adds up in another order "
            "where it decodes than where it reads"
        )
    for name, backend in (
        ("prefill_attention_backend", prefill_attention_backend),
        ("decode_attention_backend", decode_attention_backend),
    ):
        if backend not in (None, attention_backend):
            yield f"sglang.{name}: parity needs that of attention_backend, its default; {backend!r} adds up otherwise"
    if kv_cache_dtype != "auto":
        yield (
            f"sglang.kv_cache_dtype: parity needs 'auto'; {kv_cache_dtype!r} rounds keys and values, which the trainer "
            "does not"
        )


@rule(PARITY)
def _same_blocks_of_keys(shape: dict[str, Any], attention_backend: str | None) -> Iterator[str]:
    head = head_dim(shape)
    if head and attention_backend == FLASH and head not in FLASH_HEADS:
        yield (
            f"sglang.attention_backend: for heads of {head} numbers parity needs 'triton', its default for them; "
            "FlashAttention 3 reads their keys in other blocks where it decodes"
        )


@rule(PARITY)
def _same_engine(
    engine: str,
    model_impl: str,
    quantization: str | None,
    enable_lora: bool | None,
    enable_torch_compile: bool,
    enable_fp32_lm_head: bool,
    enable_fused_qk_norm_rope: bool,
    enable_quant_communications: bool,
    rl_on_policy_target: str | None,
) -> Iterator[str]:
    if engine != "sglang":
        yield f"rollout.engine: parity needs 'sglang'; {engine!r} has operations of its own"
    if model_impl not in ("auto", "sglang"):
        yield f"sglang.model_impl: parity needs 'auto'; the layers of {model_impl!r} are not the trainer's"
    for name, value in (
        ("quantization", quantization),
        ("enable_lora", enable_lora),
        ("enable_torch_compile", enable_torch_compile),
        ("enable_fp32_lm_head", enable_fp32_lm_head),
        ("enable_fused_qk_norm_rope", enable_fused_qk_norm_rope),
        ("enable_quant_communications", enable_quant_communications),
        ("rl_on_policy_target", rl_on_policy_target),
    ):
        if value:
            yield f"sglang.{name}: parity cannot hold; the trainer computes in another way"


@rule(PARITY)
def _same_trainer(
    transformer_impl: str,
    bias_activation_fusion: bool,
    fp32_residual_connection: bool,
) -> Iterator[str]:
    if transformer_impl != "local":
        yield f"megatron.transformer_impl: parity needs 'local'; {transformer_impl!r} has its own kernels"
    for name, value in (
        ("bias_activation_fusion", bias_activation_fusion),
        ("fp32_residual_connection", fp32_residual_connection),
    ):
        if value:
            yield f"megatron.{name}: must be false for parity; the engine rounds in other places"


@rule(PARITY)
def _same_cut(
    tensor_model_parallel_size: int,
    tp_size: int,
    context_parallel_size: int,
    dtype: str,
    shape: dict[str, Any],
) -> Iterator[str]:
    for name, ranks in (
        ("megatron.tensor_model_parallel_size", tensor_model_parallel_size),
        ("sglang.tp_size", tp_size),
    ):
        if ranks not in RANKS:
            yield f"{name}: parity holds for {', '.join(map(str, RANKS))}, not {ranks}; ranks add up in a binary tree"
    if context_parallel_size > 1:
        yield "megatron.context_parallel_size: must be 1 for parity; for more it was not shown to hold"
    width, unit = shape.get("intermediate_size", 0), VECTOR * max(tensor_model_parallel_size, tp_size)
    if dtype == "float32" and width % unit and "moe_intermediate_size" not in shape:
        yield (
            f"determinism.parity: must be 'off' in float32 for an intermediate_size of {width}, which {unit} does not "
            "divide; the engine rounds the width up, and sums are cut otherwise"
        )


@rule(PARITY)
def _same_distribution(rollout_top_p: float, rollout_top_k: int) -> Iterator[str]:
    for name, value, cuts in (
        ("top_p", rollout_top_p, rollout_top_p < 1),
        ("top_k", rollout_top_k, rollout_top_k > 1),
    ):
        if cuts:
            yield (
                f"rollout.rollout_{name}: parity needs the whole vocabulary; what {value} keeps of it engine and "
                "trainer find in two ways"
            )


@rule(PARITY)
def _no_budget(mismatch_budget: dict[str, float]) -> Iterator[str]:
    if mismatch_budget:
        yield "determinism.mismatch_budget: with parity nothing may differ; leave it out"


@rule(NOT_BY_DEFAULT)
def _seen_on_such_gpus(capabilities: frozenset[str]) -> Iterator[str]:
    if len(capabilities) == 1 and CAPABILITY not in capabilities:
        yield (
            f"determinism.parity: was not seen on GPUs of compute capability {next(iter(capabilities))} yet; 'bitwise' "
            "tries it"
        )


@rule(NOT_BY_DEFAULT)
def _cheap_on_gpus(dtype: str, tensor_model_parallel_size: int, tp_size: int, shape: dict[str, Any]) -> Iterator[str]:
    """``model.dtype`` says where: parity needs bf16 on a GPU and fp32 on a CPU."""
    if dtype != "bfloat16":
        return
    if shape.get("num_experts") or shape.get("num_local_experts"):
        yield "model.hf_checkpoint: has experts, whose products decode a fifth more slowly then; 'bitwise' pays that"
    if tp_size > 1:
        yield "sglang.tp_size: engines of several ranks lose their fast all-reduce; 'bitwise' pays that"
    if tp_size != tensor_model_parallel_size:
        yield "sglang.tp_size: is not the trainer's, so each side adds up the other's parts, too; 'bitwise' pays that"


@rule(NOT_BY_DEFAULT)
def _keys_in_one_piece(dtype: str, rollout_max_prompt_len: int | None, rollout_max_response_len: int) -> Iterator[str]:
    longest = (rollout_max_prompt_len or 0) + rollout_max_response_len
    if dtype == "bfloat16" and longest > LONG:
        yield (
            f"rollout.rollout_max_response_len: sequences may have {longest} tokens, and the last long ones of a "
            "rollout decode slowly where the keys of each are read in one piece, or a few; 'bitwise' pays that"
        )


@rule(CONTRADICTIONS)
def _budget_of_a_mask(parity: str, parity_gate: str | None, mismatch_budget: dict[str, float]) -> Iterator[str]:
    if parity != "bitwise" and parity_gate == "mask" and mismatch_budget and "max" not in mismatch_budget:
        yield "determinism.mismatch_budget: parity_gate = 'mask' needs `max`, beyond which a token is masked"
