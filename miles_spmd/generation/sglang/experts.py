"""How SGLang's mixtures of experts add up what a token's experts say."""

from __future__ import annotations

from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe


def register() -> None:
    """By one kernel for any number of tokens. Up to 32 tokens SGLang would have torch compile and tune one for each
    number that it meets: seconds for each of its CUDA graphs, and another order of the sum."""
    fused_moe._use_moe_sum_reduce_torch_compile = _never


def _never(num_tokens: int) -> bool:
    return False
