"""Causal attention over packed sequences on a GPU: FlashAttention 3, as SGLang calls it where it decodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_spmd.models.attention import shared_attention


def shared_backend(chosen: str | None, head: int) -> str | None:
    """SGLang's name of the attention that engine and trainer share: ``chosen``, or on a GPU what fits it and heads of
    ``head`` numbers."""
    if chosen or not torch.cuda.is_available():
        return chosen
    return shared_attention(head, ".".join(map(str, torch.cuda.get_device_capability())))


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float
) -> Tensor:
    """``query`` [T, H, D], ``key`` and ``value`` [S, G, D], 16-bit -> [T, H, D].

    ``starts``: int32 [B + 1] of queries and of keys, where each block begins; ``longest``: most queries and keys of a
    block. The last query of a block sees all of its keys. Keys are never split over thread blocks, whose partial
    results would be added in an order that depends on the batch.
    """
    return FlashAttention.apply(query.contiguous(), key.contiguous(), value.contiguous(), starts, longest, scale)


class FlashAttention(torch.autograd.Function):
    """The backward pass is FlashAttention 2's, of torch, which asks for the same numbers of the forward one."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        scale: float,
    ) -> Tensor:
        from sgl_kernel.flash_attn import flash_attn_varlen_func

        out, lse, *_ = flash_attn_varlen_func(
            query,
            key,
            value,
            *starts,
            *longest,
            softmax_scale=scale,
            causal=True,
            num_splits=1,
            return_softmax_lse=True,
        )
        ctx.save_for_backward(query, key, value, out, lse, *starts)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse, *starts = ctx.saved_tensors
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of the generator for dropout, which is none
        gradients = torch.ops.aten._flash_attention_backward(
            gradient.contiguous(),
            query,
            key,
            value,
            out,
            lse,
            *starts,
            *ctx.longest,
            0.0,
            True,
            state,
            torch.empty(0, device=query.device),
            scale=ctx.scale,
        )
        return *gradients, None, None, None
