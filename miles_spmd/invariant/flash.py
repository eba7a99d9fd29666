"""Causal attention over packed sequences on a GPU: FlashAttention 3, as SGLang calls it in decode, or ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles_spmd.invariant.compiled import sinks_gradient
from miles_spmd.invariant.split_attention import Keys, attend
from miles_spmd.invariant.split_attention_backward import backward
from miles_spmd.models.attention import PLAIN, Form, shared_attention


def shared_backend(chosen: str | None, head_dim: int) -> str | None:
    """Return SGLang's name of the attention that engine and trainer share: ``chosen``, or the default for this GPU and
    ``head_dim``; None without a GPU."""
    if chosen or not torch.cuda.is_available():
        return chosen
    return shared_attention(head_dim, ".".join(map(str, torch.cuda.get_device_capability())))


Starts = tuple[Tensor, Tensor]  # int32 [B + 1] of queries and of keys, where each block begins
Longest = tuple[int, int]  # most queries and keys of a block


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Starts,
    longest: Longest,
    scale: float,
    form: Form = PLAIN,
    sinks: Tensor | None = None,
    split: int = 0,
) -> Tensor:
    """Return [T, H, D] from ``query`` [T, H, D], ``key`` and ``value`` [S, G, D], all in 16 bits.

    The last query of a block sees all of its keys, or those in the window of ``form``. ``sinks`` [H]: a score of every
    row that has no value. Keys are never split over thread blocks: their partial results would be summed in an order
    that depends on the batch. ``split``: attend by :mod:`miles_spmd.invariant.split_attention` instead, in parts of so
    many (2^n) keys. Raises ValueError for values of another head_dim.
    """
    if value.shape != key.shape:
        raise ValueError(
            f"keys {list(key.shape)} and values {list(value.shape)}: values of another head_dim than keys are not "
            "supported on a GPU"
        )
    inputs = query.contiguous(), key.contiguous(), value.contiguous()
    return _FlashAttention.apply(*inputs, sinks, starts, longest, scale, form, split)


class _FlashAttention(torch.autograd.Function):
    """The backward pass is torch's FlashAttention 2, which needs the same results of a forward pass: the output and the
    log of the sum of exponentials. It knows no sinks, which only change these, and no soft-cap, for which ours is."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        starts: Starts,
        longest: Longest,
        scale: float,
        form: Form,
        split: int,
    ) -> Tensor:
        if split:
            queries, keys = starts
            slots = torch.arange(len(key), dtype=torch.int32, device=key.device)
            held = Keys(key, value, keys.diff(), slots, keys[:-1].long())
            out, lse = attend(query, held, queries, longest[0], scale, split, form, sinks)
        else:
            out, lse = _flash_attention_3(query, key, value, starts, longest, scale, form, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse, *starts)
        ctx.longest, ctx.scale, ctx.form = longest, scale, form
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, sinks, out, lse, *starts = ctx.saved_tensors
        gradient = gradient.contiguous()
        if ctx.form.softcap:
            where = (starts[0], starts[1]), ctx.longest, ctx.scale, ctx.form
            gradients = backward(gradient, query, key, value, out, lse, *where)
        else:
            # dropout is 0, but torch's function requires the state of the generator that dropout would use
            state = torch.zeros(2, dtype=torch.uint64, device=query.device)
            unused, dropout, causal = torch.empty(0, device=query.device), 0.0, True
            window = {"window_size_left": ctx.form.window - 1, "window_size_right": 0} if ctx.form.window else {}
            gradients = torch.ops.aten._flash_attention_backward(
                gradient, query, key, value, out, lse, *starts, *ctx.longest, dropout, causal, state, unused,
                scale=ctx.scale, **window,
            )  # fmt: skip
        of_sinks = None if sinks is None else sinks_gradient(sinks.float(), lse.T, gradient, out).to(sinks.dtype)
        return *gradients, of_sinks, None, None, None, None, None


def _flash_attention_3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Starts,
    longest: Longest,
    scale: float,
    form: Form,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log of the sum of exponentials, fp32 [H, T], which includes the sinks."""
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    # one thread block reads all keys of a query; its windows do not count the query itself
    options: dict[str, Any] = {"causal": True, "num_splits": 1, "return_softmax_lse": True}
    if form.window:
        options["window_size"] = form.window - 1, 0
    if form.softcap:
        options["softcap"] = form.softcap
    if sinks is not None:
        options["sinks"] = sinks.bfloat16()  # the kernel takes no other dtype
    out, lse, *_ = flash_attn_varlen_func(query, key, value, *starts, *longest, softmax_scale=scale, **options)
    return out, lse
