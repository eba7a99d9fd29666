"""`[determinism]`: whether runs of one configuration are bitwise equal, and what a run keeps to show it.

The rules of kind ``PARITY`` say why log-probs of engine and trainer cannot be bitwise equal.
"""

from typing import Literal

from miles_spmd.config.checks import ERRORS, NOT_BY_DEFAULT, PARITY, Messages, Settings, rule
from miles_spmd.config.table import NonNegativeFloat, PositiveFloat, Table
from miles_spmd.models.attention import CAPABILITY, FLASH, FLASH_HEADS, SPLIT_KEYS
from miles_spmd.models.hf_config import count_experts, expert_width, head_dim

BATCH_INVARIANT = ("fa3", "triton", "flashinfer")  # attention of SGLang's deterministic mode


class DeterminismConfig(Table):
    """Whether runs of one configuration are bitwise equal, and what a run keeps to show it."""

    deterministic: bool = False
    """Two runs on identical hardware and software are bitwise equal: every kernel and collective sums in a fixed order,
    and no response depends on what else the engine computes."""
    ledger: bool = True
    """Keep in `ledger/` a hash chain over what every step read and computed; see `miles-spmd ledger`, `diff`, `replay`.
    """
    ledger_data_gib: NonNegativeFloat = 4.0
    """GiB of tokens, log-probs, rewards and advantages of the newest steps, kept beside the ledger. `diff` needs
    them to name the token, and `replay --phase train` reads them instead of generating. 0: keep none."""
    parity: Literal["auto", "bitwise", "off"] = "auto"
    """`bitwise`: engine and trainer compute log-probs by the same batch-invariant kernels, so that they are equal; what
    prevents that is an error. `auto`: the same where nothing prevents it, else `off`, and the log gives the reason."""
    parity_gate: Literal["warn", "mask", "stop"] | None = None
    """What happens when engine and trainer differ by more than is allowed. With `bitwise` no difference is. `warn`: one
    warning; `mask`: the tokens are not trained on, which takes a forward pass beforehand; `stop`: the run ends and
    names the first one. The default is `stop`, and `warn` where `auto` has chosen."""
    mismatch_budget: dict[Literal["mean", "p999", "max", "k3", "top1_flips"], PositiveFloat] = {}
    """How far log-probs of engine and trainer may differ without `bitwise`, by what is measured of a step: mean, 99.9th
    percentile and maximum of the absolute difference, k3 of the KL divergence, and the share of places with different
    top-1 tokens, which takes a forward pass beforehand. It depends on model and dtype."""

    @property
    def counts_flips(self) -> bool:
        return "top1_flips" in self.mismatch_budget

    @property
    def masks_tokens(self) -> bool:
        return self.parity_gate == "mask" and (self.parity == "bitwise" or bool(self.mismatch_budget))


@rule(ERRORS)
def _engine_is_deterministic(s: Settings) -> Messages:
    if not s.deterministic:
        return
    if s.attention_backend not in (None, *BATCH_INVARIANT):
        yield (
            f"sglang.attention_backend: with determinism.deterministic take one of {', '.join(BATCH_INVARIANT)}; the "
            f"result of {s.attention_backend!r} depends on what else is in the batch"
        )
    if s.schedule_policy == "random":
        yield "sglang.schedule_policy: 'random' has no seed, so determinism.deterministic cannot hold"
    if s.enable_torch_compile:
        yield "sglang.enable_torch_compile: determinism.deterministic cannot hold; kernels are chosen by timing them"
    for name in ("enable_nccl_nvls", "enable_symm_mem", "enable_mscclpp", "enable_torch_symm_mem"):
        if s[name]:
            yield f"sglang.{name}: determinism.deterministic cannot hold; its reduction order is not fixed"


@rule(ERRORS)
def _trainer_is_deterministic(s: Settings) -> Messages:
    for name in ("nccl_ub", "tp_comm_overlap"):
        if s.deterministic and s[name]:
            yield f"megatron.{name}: determinism.deterministic cannot hold; its reduction order is not fixed"


@rule(ERRORS)
def _budget_of_a_mask(s: Settings) -> Messages:
    budget = s.mismatch_budget
    if s.parity != "bitwise" and s.parity_gate == "mask" and budget and "max" not in budget:
        yield "determinism.mismatch_budget: parity_gate = 'mask' needs `max`, beyond which a token is masked"


RANKS = 1, 2, 4  # numbers of ranks for which sums over the hidden dimension were shown to be equal
TESTED_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")  # whose parity was seen on GPUs
VECTOR = 32  # numbers in a CPU's vectors: SGLang rounds each rank's part of an MLP up to a multiple there
LONG = 4096  # tokens beyond which a GPU that reads a sequence's keys in one piece, or a few, is clearly slower
SHARED = FLASH, SPLIT_KEYS, "torch_native"  # attention that both sides have; the last one on CPUs


@rule(PARITY)
def _something_to_compare(s: Settings) -> Messages:
    if s.mode != "rl":
        yield f"run.mode: parity compares the log-probs of generated tokens; mode {s.mode!r} generates none to train on"


@rule(PARITY)
def _batch_invariant_products(s: Settings) -> Messages:
    device, dtype = ("GPU", "bfloat16") if s.capabilities else ("CPU", "float32")
    if s.dtype != dtype:
        yield f"model.dtype: parity needs {dtype!r} on a {device}; products in {s.dtype!r} depend on the batch there"
    if s.capabilities and s.attention_backend == "torch_native":
        yield "sglang.attention_backend: parity needs 'fa3' or 'triton' on a GPU; left out, it takes the one that fits"
    found = ", ".join(sorted(s.capabilities))
    if len(s.capabilities) > 1:
        yield (
            f"determinism.parity: must be 'off' on GPUs of several compute capabilities ({found}), whose kernels round "
            "differently"
        )
    elif s.attention_backend == FLASH and s.capabilities - {CAPABILITY}:
        yield (
            f"sglang.attention_backend: on GPUs of compute capability {found} parity needs 'triton', its default; "
            f"FlashAttention 3 needs {CAPABILITY}"
        )


@rule(PARITY)
def _same_attention(s: Settings) -> Messages:
    if s.attention_backend not in (None, *SHARED):
        yield (
            f"sglang.attention_backend: parity needs 'fa3' or 'triton'; the reduction order of {s.attention_backend!r} "
            "differs between prefill and decode"
        )
    for name in ("prefill_attention_backend", "decode_attention_backend"):
        if s[name] not in (None, s.attention_backend):
            yield (
                f"sglang.{name}: parity needs that of attention_backend, its default; the reduction order of "
                f"{s[name]!r} differs"
            )
    if s.kv_cache_dtype != "auto":
        yield (
            f"sglang.kv_cache_dtype: parity needs 'auto'; {s.kv_cache_dtype!r} rounds keys and values, which the "
            "trainer does not"
        )


@rule(PARITY)
def _same_blocks_of_keys(s: Settings) -> Messages:
    head = head_dim(s.shape)
    if head and s.attention_backend == FLASH and head not in FLASH_HEADS:
        yield (
            f"sglang.attention_backend: for head_dim {head} parity needs 'triton', its default there; FlashAttention 3 "
            "reads such keys in blocks of different sizes in prefill and decode"
        )


@rule(PARITY)
def _same_engine(s: Settings) -> Messages:
    if s.engine != "sglang":
        yield f"rollout.engine: parity needs 'sglang'; {s.engine!r} has operations of its own"
    if s.model_impl not in ("auto", "sglang"):
        yield f"sglang.model_impl: parity needs 'auto'; the layers of {s.model_impl!r} are not the trainer's"
    for name in (
        "quantization",
        "enable_lora",
        "enable_torch_compile",
        "enable_fp32_lm_head",
        "enable_fused_qk_norm_rope",
        "enable_quant_communications",
        "rl_on_policy_target",
    ):
        if s[name]:
            yield f"sglang.{name}: parity cannot hold; the trainer computes differently"


@rule(PARITY)
def _same_trainer(s: Settings) -> Messages:
    if s.transformer_impl != "local":
        yield f"megatron.transformer_impl: parity needs 'local'; {s.transformer_impl!r} has its own kernels"
    for name in ("bias_activation_fusion", "fp32_residual_connection"):
        if s[name]:
            yield f"megatron.{name}: must be false for parity; the engine rounds in other places"


@rule(PARITY)
def _same_partial_sums(s: Settings) -> Messages:
    tensor, engine = s.tensor_model_parallel_size, s.tp_size
    for name, ranks in (("megatron.tensor_model_parallel_size", tensor), ("sglang.tp_size", engine)):
        if ranks not in RANKS:
            yield f"{name}: parity holds for {', '.join(map(str, RANKS))}, not {ranks}; partial sums form a binary tree"
    if s.context_parallel_size > 1:
        yield "megatron.context_parallel_size: must be 1 for parity; larger sizes were not shown to be equal"
    width, unit = s.shape.get("intermediate_size", 0), VECTOR * max(tensor, engine)
    if s.dtype == "float32" and width % unit and "moe_intermediate_size" not in s.shape:
        yield (
            f"determinism.parity: must be 'off' in float32 for an intermediate_size of {width}, which {unit} does not "
            "divide; the engine rounds the width up, so its partial sums differ"
        )


@rule(PARITY)
def _same_distribution(s: Settings) -> Messages:
    top_p, top_k = s.rollout_top_p, s.rollout_top_k
    for name, value, restricts in (("top_p", top_p, top_p < 1), ("top_k", top_k, top_k > 1)):
        if restricts:
            yield (
                f"rollout.rollout_{name}: parity needs the whole vocabulary; engine and trainer find the part of it "
                f"that {value} keeps in different ways"
            )


@rule(PARITY)
def _no_budget(s: Settings) -> Messages:
    if s.mismatch_budget:
        yield "determinism.mismatch_budget: with parity nothing may differ; leave it out"


# --- experts ---------------------------------------------------------------------------------------------------------


@rule(PARITY)
def _same_routing(s: Settings) -> Messages:
    if not count_experts(s.shape):
        return
    for name in (
        "moe_router_dtype",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_router_topk_scaling_factor",
        "moe_router_enable_expert_bias",
        "moe_router_force_biased",
        "moe_router_force_load_balancing",
        "moe_router_fusion",
        "moe_enable_routing_replay",
        "moe_input_jitter_eps",
        "moe_expert_capacity_factor",
    ):
        if s[name]:
            yield f"megatron.{name}: leave it out for parity; the engine routes without it"
    if "sinkhorn" in s.moe_router_load_balancing_type:
        yield "megatron.moe_router_load_balancing_type: leave it out for parity; the engine routes without it"


@rule(PARITY)
def _same_expert_kernels(s: Settings) -> Messages:
    if not count_experts(s.shape):
        return
    for name, default in (
        ("moe_runner_backend", "auto"),
        ("moe_a2a_backend", "none"),
        ("ep_num_redundant_experts", 0),
        ("enable_eplb", False),
    ):
        if s[name] != default:
            yield f"sglang.{name}: parity needs {default!r}; the trainer combines expert outputs differently"


@rule(PARITY)
def _same_partial_sums_of_experts(s: Settings) -> Messages:
    if not count_experts(s.shape):
        return
    if s.ep_size != s.tp_size:
        yield f"sglang.ep_size: parity needs tp_size, {s.tp_size}; ranks that split experts sum in a different order"
    if (s.expert_tensor_parallel_size or s.tensor_model_parallel_size) > 1:
        yield "megatron.expert_tensor_parallel_size: parity needs 1; partial sums of an expert are rounded too early"
    width = expert_width(s.shape)
    if s.dtype == "float32" and width % VECTOR:
        yield (
            f"determinism.parity: must be 'off' in float32 for experts of width {width}, which {VECTOR} does "
            "not divide; the engine rounds the width up"
        )


# --- possible, but off by default ------------------------------------------------------------------------------------


@rule(NOT_BY_DEFAULT)
def _tested_gpus(s: Settings) -> Messages:
    if len(s.capabilities) == 1 and CAPABILITY not in s.capabilities:
        (found,) = s.capabilities
        yield f"determinism.parity: is not yet tested on GPUs of compute capability {found}; 'bitwise' tries it"


@rule(NOT_BY_DEFAULT)
def _tested_families(s: Settings) -> Messages:
    found = s.shape.get("model_type")
    if s.dtype == "bfloat16" and found not in (*TESTED_FAMILIES, None):
        yield f"model.hf_checkpoint: {found} models are not yet tested on GPUs; 'bitwise' tries it"


@rule(NOT_BY_DEFAULT)
def _cheap_on_gpus(s: Settings) -> Messages:
    """``model.dtype`` implies the device: parity needs bf16 on a GPU and fp32 on a CPU."""
    if s.dtype != "bfloat16":
        return
    if count_experts(s.shape):
        yield "model.hf_checkpoint: has experts, whose decode is a fifth slower with parity; 'bitwise' accepts that"
    if s.tp_size > 1:
        yield "sglang.tp_size: engines of several ranks lose their fast all-reduce; 'bitwise' accepts that"
    if s.tp_size != s.tensor_model_parallel_size:
        yield (
            "sglang.tp_size: differs from the trainer's, so each side also computes the partial sums of the other's "
            "ranks; 'bitwise' accepts that"
        )


@rule(NOT_BY_DEFAULT)
def _keys_in_one_piece(s: Settings) -> Messages:
    longest = (s.rollout_max_prompt_len or 0) + s.rollout_max_response_len
    if s.dtype == "bfloat16" and longest > LONG:
        yield (
            f"rollout.rollout_max_response_len: sequences may have {longest} tokens, and the last long ones of a "
            "rollout decode slowly where the keys of each are read in one piece, or a few; 'bitwise' accepts that"
        )
