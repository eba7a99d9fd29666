"""Causal attention in one compiled kernel (``kernels/attention.cpp``), on CPUs for which it was built."""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import CDLL, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("cpu_kernels.so")
Starts = tuple[Tensor, Tensor]  # int64 [B + 1] of queries and of keys, where each sequence begins
LANES = 8  # float32 numbers of a vector register


def takes(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Return whether the kernel was built, runs on this CPU and supports this dtype and ``head_dim``."""
    return dtype == torch.float32 and device.type == "cpu" and head_dim % LANES == 0 and _library() is not None


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, starts: Starts, slots: Tensor | None = None
) -> Tensor:
    """Return [T, H, D] from ``query`` [T, H, D], ``key`` and ``value`` [K, G, D], all float32.

    A sequence's last query sees all of its keys. ``slots``: int32, the row of ``key`` and ``value`` where each key
    lies, without a gradient; None: the rows in order, with a gradient.
    """
    return _Attention.apply(query, key, value, starts, slots, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Starts, slots: Tensor | None, scale: float
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:2])
        inputs = map(_address, (query, key, value, slots))
        shape = _shape(query, key, starts, scale)
        _library().attention_forward(*inputs, *shape, _address(out), _address(lse))  # type: ignore[union-attr]
        ctx.save_for_backward(query, key, value, out, lse, *starts)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse, *starts = ctx.saved_tensors
        # A name for the copy keeps it alive until the kernel, which has only addresses, has returned.
        gradient = gradient.contiguous()
        # the kernel writes the gradient of queries, and adds to those of keys and values
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        inputs = map(_address, (gradient, query, key, value, out, lse, None))
        shape = _shape(query, key, starts, ctx.scale)
        gradients = map(_address, (grad_query, grad_key, grad_value))
        _library().attention_backward(*inputs, *shape, *gradients)  # type: ignore[union-attr]
        return grad_query, grad_key, grad_value, None, None, None


def _shape(query: Tensor, key: Tensor, starts: Iterable[Tensor], scale: float) -> tuple[Any, ...]:
    """Return the arguments that describe sequences, in the order of the C functions. Tensors must stay alive: only
    their addresses are passed."""
    of_query, of_key = starts
    sizes = len(of_query) - 1, query.shape[1], key.shape[1], query.shape[2]
    return _address(of_query), _address(of_key), *map(c_int64, sizes), c_float(scale)


def _address(tensor: Tensor | None) -> c_void_p | None:
    return None if tensor is None else c_void_p(tensor.data_ptr())


@cache
def _library() -> CDLL | None:
    """Return the library, or None where it was not built or this CPU lacks its instructions (AVX2 and FMA)."""
    if not LIBRARY.is_file() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    return CDLL(str(LIBRARY))
