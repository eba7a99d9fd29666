"""Causal attention in one compiled kernel (``kernels/attention.cpp``), on CPUs for which it was built."""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import CDLL, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_spmd.models.attention import PLAIN, Form

LIBRARY = Path(__file__).with_name("cpu_kernels.so")
LANES = 8  # float32 numbers of a vector register


def takes(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Return whether the kernel was built, runs on this CPU and supports this dtype and ``head_dim``.

    Raises ImportError for a library that was built from other sources.
    """
    return dtype == torch.float32 and device.type == "cpu" and head_dim % LANES == 0 and _library() is not None


class CompiledAttention:
    """Attention over streams in which sequences of the given lengths lie end to end.

    A sequence's last query sees all of its keys. ``slots``: int32, the row of keys and values where each key lies,
    without a gradient; None: the rows in order, with a gradient. Raises TypeError and ValueError for other slots.
    """

    def __init__(self, query_lengths: np.ndarray, key_lengths: np.ndarray, slots: Tensor | None) -> None:
        self.count, self.keys = int(query_lengths.sum()), int(key_lengths.sum())
        if slots is not None and slots.dtype != torch.int32:
            raise TypeError(f"slots are {slots.dtype}: the compiled attention takes int32")
        if slots is not None and (slots.shape != (self.keys,) or not slots.is_contiguous()):
            raise ValueError(f"slots of shape {list(slots.shape)} are not one for each of {self.keys} keys, in order")
        self.slots = slots
        self.starts = tuple(torch.from_numpy(np.concatenate([[0], np.cumsum(n)])) for n in (query_lengths, key_lengths))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, form: Form = PLAIN, sinks: Tensor | None = None
    ) -> Tensor:
        """Return [T, H, V] from ``query`` [T, H, D], ``key`` [K, G, D] and ``value`` [K, G, V], all float32, and
        ``sinks`` [H] of any floating dtype.

        With slots a cache is read as it is: ``key`` must be contiguous, and ``value``, too, or the first V numbers of
        contiguous heads. Raises TypeError for another dtype and ValueError for other shapes and layouts.
        """
        query = query.contiguous()
        if self.slots is None:
            key, value = key.contiguous(), value.contiguous()
        if sinks is not None:
            sinks = sinks.float().contiguous()
        self._check(query, key, value, sinks)
        return _Attention.apply(query, key, value, sinks, self.starts, self.slots, scale, form)

    def _check(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> None:
        """Raise an error for what the kernel, which has only addresses, would misread. In every call of a decode."""
        if not query.dtype is key.dtype is value.dtype is torch.float32:
            raise TypeError(
                f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: the compiled attention takes "
                "float32"
            )
        (tokens, heads, width), (rows, groups, key_width) = query.shape, key.shape
        (value_rows, value_groups, value_width), strides = value.shape, value.stride()
        if width != key_width or rows != value_rows or groups != value_groups or heads % groups:
            problem = (
                "query and key need one head_dim, key and value one shape, and heads of keys divide those of queries"
            )
        elif width % LANES or value_width % LANES:
            problem = f"head_dims need to be multiples of {LANES}"
        elif tokens != self.count or (self.slots is None and rows != self.keys):
            problem = f"the sequences have {self.count} queries and {self.keys} keys"
        elif not key.is_contiguous() or strides[2] != 1 or (groups > 1 and strides[0] != groups * strides[1]):
            problem = "keys and values need to be contiguous"
        elif sinks is not None and sinks.shape != (heads,):
            problem = f"there are {list(sinks.shape)} sinks"
        elif query.is_cpu and key.is_cpu and value.is_cpu:
            return
        else:
            problem = "the compiled attention runs on a CPU"
        layouts = ", ".join(f"{list(x.shape)} with strides {x.stride()}" for x in (query, key, value))
        raise ValueError(
            f"{problem}; query, key and value are {layouts} on {query.device}, {key.device}, {value.device}"
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        starts: tuple[Tensor, ...],  # int64 [B + 1] of queries and of keys, where each sequence begins
        slots: Tensor | None,
        scale: float,
        form: Form,
    ) -> Tensor:
        rows = query.shape[:2]
        out, lse = query.new_empty((*rows, value.shape[2])), query.new_empty(rows)
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
    return _address(of_query), _address(of_key), *sizes, scale, form.softcap


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
    shape = [c_void_p] * 2 + [c_int64] * 7 + [c_float] * 2
    library.packed_attention.argtypes = [c_void_p] * 5 + shape + [c_void_p] * 2
    library.packed_attention_backward.argtypes = [c_void_p] * 6 + shape + [c_void_p] * 3
    return library
