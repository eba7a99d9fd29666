"""What the compiled attention refuses: it has only addresses, and what does not fit would read and write memory of
others."""

from __future__ import annotations

import _ctypes
from pathlib import Path

import pytest
import torch

from miles_spmd.invariant import compiled
from miles_spmd.invariant.attention import packed_attention
from miles_spmd.models.attention import PLAIN
from tests.invariant.both_ways import kernels, needs_build


@needs_build
def test_what_the_kernel_refuses() -> None:
    slots = torch.arange(9, dtype=torch.int32)
    q, cache = torch.randn(1, 4, 16), torch.randn(20, 2, 16)
    with kernels(True):
        attend = packed_attention([1], [9], q, cache, slots)
        attend(q, cache, cache, 0.3)
        for inputs in ((q.bfloat16(), cache, cache), (q, cache.bfloat16(), cache), (q, cache, cache.double())):
            with pytest.raises(TypeError, match=r"takes float32 on a CPU"):
                attend(*inputs, 0.3)
        with pytest.raises(TypeError, match=r"slots are torch\.int64"):
            packed_attention([1], [9], q, cache, slots.long())(q, cache, cache, 0.3)
        wrong = {
            "one head_dim of query and key": (q[..., :8], cache, cache),
            "as many values as keys": (q, cache, cache[1:]),
            "head_dims that are multiples of 8": (q, cache, cache[..., :12]),
            "a number of query heads that is a multiple of key heads": (q[:, :3], cache, cache),
            "1 queries and 9 keys": (q.repeat(2, 1, 1), cache, cache),
            "contiguous keys, values and slots": (q, cache.transpose(0, 1).contiguous().transpose(0, 1), cache),
            "contiguous keys, values": (
                q,
                cache,
                torch.randn(20, 4, 16)[:, ::2].transpose(0, 1).contiguous().transpose(0, 1),
            ),
        }
        for message, inputs in wrong.items():
            with pytest.raises(ValueError, match=message):
                attend(*inputs, 0.3)
        with pytest.raises(ValueError, match="one sink per query head"):
            attend(q, cache, cache, 0.3, PLAIN, torch.zeros(3))
        with pytest.raises(ValueError, match="1 queries and 9 keys"):
            packed_attention([1], [9], q, cache, slots[:8])(q, cache, cache, 0.3)


@needs_build
def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LIBRARY", Path(_ctypes.__file__))
    one = torch.empty(0, 1, 8)
    with kernels(True), pytest.raises(ImportError, match="was built from other sources: build it again"):
        packed_attention([1], [1], one, one)
