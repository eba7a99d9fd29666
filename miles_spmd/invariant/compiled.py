"""Causal attention in one compiled kernel (``kernels/attention.cpp``), on CPUs for which it was built."""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import CDLL, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_spmd.models.attention import PLAIN, Form

LIBRARY = Path(__file__).with_name("cpu_kernels.so")
Starts = tuple[Tensor, Tensor]  # int64 [B + 1] of queries and of keys, where each sequence begins
LANES = 8  # float32 numbers of a vector register


def takes(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Return whether the kernel was built, runs on this CPU and supports this dtype and ``head_dim``.

    Raises ImportError for a library that was built from other sources.
    """
    return dtype == torch.float32 and device.type == "cpu" and head_dim % LANES == 0 and _library() is not None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    form: Form = PLAIN,
    sinks: Tensor | None = None,
    *,
    starts: Starts,
    slots: Tensor | None = None,
) -> Tensor:
    """Return [T, H, V] from ``query`` [T, H, D], ``key`` [K, G, D] and ``value`` [K, G, V], all float32.

    A sequence's last query sees all of its keys, or those in the window of ``form``. ``sinks`` [H]: a score of every
    row that has no value, with a gradient. ``slots``: int32, the row of ``key`` and ``value`` where each key lies,
    without a gradient; None: the rows in order, with a gradient. With ``slots`` the cache is read as it is: ``key`` is
    contiguous, and ``value``, too, or the first V numbers of contiguous heads.

    Raises TypeError for another dtype and ValueError for other shapes: the kernel has only addresses.
    """
    if sinks is not None:
        sinks = sinks.float().contiguous()
    if slots is None:
        key, value = key.contiguous(), value.contiguous()
    query = query.contiguous()
    _check(query, key, value, sinks, starts, slots)
    return _Attention.apply(query, key, value, sinks, starts, slots, scale, form)


def _check(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, starts: Starts, slots: Tensor | None
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(f"{name} is {x.dtype} on {x.device}: the compiled attention takes float32 on a CPU")
    if slots is not None and slots.dtype != torch.int32:
        raise TypeError(f"slots are {slots.dtype}: the compiled attention takes int32")
    heads, groups, keys = query.shape[1], key.shape[1], len(key if slots is None else slots)
    lie = tuple(int(of[-1]) for of in starts)
    fits = {
        "one head_dim of query and key": query.shape[2] == key.shape[2],
        "as many values as keys": value.shape[:2] == key.shape[:2],
        "head_dims that are multiples of 8": query.shape[2] % LANES == 0 and value.shape[2] % LANES == 0,
        "a number of query heads that is a multiple of key heads": heads % groups == 0,
        "one sink per query head": sinks is None or sinks.shape == (heads,),
        f"{lie[0]} queries and {lie[1]} keys": lie == (len(query), keys),
        "contiguous keys, values and slots": key.is_contiguous()
        and (value.stride(2) == 1 and (groups == 1 or len(value) == 1 or value.stride(0) == groups * value.stride(1)))
        and (slots is None or slots.is_contiguous()),
    }
    missing = [what for what, there in fits.items() if not there]
    if missing:
        shapes = [f"{list(x.shape)} with strides {x.stride()}" for x in (query, key, value)]
        raise ValueError(
            f"the compiled attention needs {' and '.join(missing)}, and got query, key and value {', '.join(shapes)}, "
            f"{keys} keys in all and sinks {None if sinks is None else list(sinks.shape)}"
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        starts: Starts,
        slots: Tensor | None,
        scale: float,
        form: Form,
    ) -> Tensor:
        out, lse = query.new_empty(*query.shape[:2], value.shape[-1]), query.new_empty(query.shape[:2])
        inputs = map(_address, (query, key, value, slots, sinks))
        shape = _shape(query, key, value, starts, scale, form)
        _library().packed_attention(*inputs, *shape, _address(out), _address(lse))  # type: ignore[union-attr]
        ctx.save_for_backward(query, key, value, sinks, out, lse, *starts)
        ctx.scale, ctx.form = scale, form
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, sinks, out, lse, *starts = ctx.saved_tensors
        # A name for the copy keeps it alive until the kernel, which has only addresses, has returned.
        gradient = gradient.contiguous()
        # the kernel writes the gradient of queries, and adds to those of keys and values
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        inputs = map(_address, (gradient, query, key, value, out, lse))
        shape = _shape(query, key, value, starts, ctx.scale, ctx.form)
        gradients = map(_address, (grad_query, grad_key, grad_value))
        _library().packed_attention_backward(*inputs, *shape, *gradients)  # type: ignore[union-attr]
        grad_sinks = None if sinks is None else sinks_gradient(sinks, lse, gradient, out)
        return grad_query, grad_key, grad_value, grad_sinks, None, None, None, None


def sinks_gradient(sinks: Tensor, lse: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
    """Return the gradient of ``sinks`` fp32 [H] from ``lse`` fp32 [T, H], which includes them, and from the attention's
    output and its ``gradient`` [T, H, D].

    Of softmax: d score = p (d p - sum of p d p). A sink has no value, hence d p = 0, and the sum is gradient . out.
    """
    return -((sinks - lse).exp() * (gradient.float() * out.float()).sum(-1)).sum(0)


def _value_stride(value: Tensor) -> int:
    """Return the distance of a key-value head's values from the next one's."""
    return value.stride(1) if value.shape[1] > 1 else value.stride(0)


def _shape(
    query: Tensor, key: Tensor, value: Tensor, starts: Iterable[Tensor], scale: float, form: Form
) -> tuple[Any, ...]:
    """Return the arguments that describe sequences, in the order of the C functions. Tensors must stay alive: only
    their addresses are passed."""
    of_query, of_key = starts
    (_, heads, width), groups = query.shape, key.shape[1]
    sizes = len(of_query) - 1, heads, groups, width, value.shape[-1], _value_stride(value), form.window
    return _address(of_query), _address(of_key), *map(c_int64, sizes), c_float(scale), c_float(form.softcap)


def _address(tensor: Tensor | None) -> c_void_p | None:
    return None if tensor is None else c_void_p(tensor.data_ptr())


@cache
def _library() -> CDLL | None:
    """Return the library, or None where it was not built or this CPU lacks its instructions (AVX2 and FMA)."""
    if not LIBRARY.is_file() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    library = CDLL(str(LIBRARY))
    if not hasattr(library, "packed_attention"):
        raise ImportError(
            f"{LIBRARY} was built from other sources: build it again, cmake -B build && cmake --build build"
        )
    return library
