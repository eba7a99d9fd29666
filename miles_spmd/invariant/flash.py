"""Causal attention over packed sequences on a GPU: FlashAttention 3, as SGLang calls it in decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_spmd.models.attention import shared_attention


def shared_backend(chosen: str | None, head_dim: int) -> str | None:
    """Return SGLang's name of the attention that engine and trainer share: ``chosen``, or the default for this GPU and
    ``head_dim``; None without a GPU."""
    if chosen or not torch.cuda.is_available():
        return chosen
    return shared_attention(head_dim, ".".join(map(str, torch.cuda.get_device_capability())))


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float
) -> Tensor:
    """Return [T, H, D] from ``query`` [T, H, D], ``key`` and ``value`` [S, G, D], all in 16 bits.

    ``starts``: int32 [B + 1] of queries and of keys, where each block begins; ``longest``: most queries and keys of a
    block. The last query of a block sees all of its keys. Keys are never split over thread blocks: their partial
    results would be summed in an order that depends on the batch.
    """
    return FlashAttention.apply(query.contiguous(), key.contiguous(), value.contiguous(), starts, longest, scale)


class FlashAttention(torch.autograd.Function):
    """The backward pass is torch's FlashAttention 2, which needs the same results of a forward pass: the output and the
    log of the sum of exponentials."""

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
            num_splits=1,  # one thread block reads all keys of a query
            return_softmax_lse=True,
        )
        ctx.save_for_backward(query, key, value, out, lse, *starts)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse, *starts = ctx.saved_tensors
        # dropout is 0, but torch's function requires the state of the generator that dropout would use
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        gradients = torch.ops.aten._flash_attention_backward(
            gradient.contiguous(),
            query,
            key,
            value,
            out,
            lse,
            *starts,
            *ctx.longest,
            0.0,  # dropout
            True,  # causal
            state,
            torch.empty(0, device=query.device),
            scale=ctx.scale,
        )
        return *gradients, None, None, None
