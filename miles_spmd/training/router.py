"""The routers of mixtures of experts: Megatron's, which choose and weight experts as an engine does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from miles_spmd.invariant.experts import choose
from miles_spmd.invariant.linear import linear_fp32
from miles_spmd.models.blocks import experts as blocks
from miles_spmd.training.invariant_layers import multiply
from miles_spmd.training.megatron_config import NetworkConfig

ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Router(TopKRouter):
    """Computes logits in the dtype that the model describes, else in ``moe_router_dtype``, by default the model's
    dtype; and scores in fp32, as engines do.

    Experts are chosen by :func:`~miles_spmd.invariant.experts.choose` where the model describes its router, because
    Megatron cannot express all of them, and where results have to be the engine's; otherwise by Megatron's function.
    """

    def __init__(self, config: NetworkConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.form = config.router or _described_by_megatron(config)
        if (self.form.count, self.form.per_token) != (config.num_moe_experts, config.moe_router_topk):
            raise ValueError(
                f"the model's router chooses {self.form.per_token} of {self.form.count} experts; num_moe_experts is "
                f"{config.num_moe_experts}, moe_router_topk {config.moe_router_topk}"
            )
        if self.form.bias:
            # A choice has no gradient. It is a parameter so that it is loaded, exported and copied to engines.
            self.expert_bias = torch.nn.Parameter(torch.zeros(self.form.count), requires_grad=False)
        if self.form.logit_bias:
            self.bias = torch.nn.Parameter(torch.empty(self.form.count, dtype=config.params_dtype))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Keep the correction bias in fp32 where a model is moved to 16 bits: it decides between near scores."""
        super()._apply(fn, recurse)
        self._maintain_float32_expert_bias()
        return self

    def gating(self, hidden: Tensor) -> Tensor:
        fp32 = self.form.logit_dtype == "fp32"
        if self.config.invariant:
            if fp32:
                return _LogitsFP32.apply(hidden, self.weight, self.bias)
            return multiply(hidden, self.weight, self.bias).float()
        dtype = torch.float32 if fp32 else ROUTER_DTYPES.get(self.config.moe_router_dtype, hidden.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(hidden.to(dtype), self.weight.to(dtype), bias).float()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weights of the chosen experts, fp32 [T, E], 0 elsewhere, and which are chosen, bool [T, E], from
        ``logits`` fp32 [T, 1, E]."""
        if not self.config.invariant and self.config.router is None:
            return super().routing(logits, padding_mask)
        logits = self.apply_z_loss(logits.view(-1, self.form.count), padding_mask)
        weights, experts = choose(logits, self.form, self.expert_bias)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, experts, True)
        return torch.zeros_like(logits).scatter(1, experts, weights), chosen


def _described_by_megatron(config: NetworkConfig) -> blocks.Router:
    """Return the description of a plain softmax router from Megatron's settings."""
    return blocks.Router(
        config.num_moe_experts, config.moe_router_topk, softmax_first=bool(config.moe_router_pre_softmax)
    )


class _LogitsFP32(torch.autograd.Function):
    """:func:`~miles_spmd.invariant.linear.linear_fp32` with a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear_fp32(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        grad_weight = rows.t() @ hidden.reshape(len(rows), -1).float()
        grad_bias = None if ctx.bias_dtype is None else rows.sum(0).to(ctx.bias_dtype)
        return (gradient @ weight.float()).to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias
