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
    turned = torch.randn(2, 20, 16).transpose(0, 1)
    wrong_inputs = {
        "query and key need one head_dim": (q[..., :8], cache, cache),
        "key and value one shape": (q, cache, cache[1:]),
        "heads of keys divide those of queries": (q[:, :3], cache, cache),
        "head_dims need to be multiples of 8": (q, cache, cache[..., :12]),
        "the sequences have 1 queries and 9 keys": (q.repeat(2, 1, 1), cache, cache),
        "keys and values need to be contiguous": (q, turned, cache),
        "values need to be contiguous": (q, cache, turned),
        "the compiled attention runs on a CPU": (q, cache, cache.to("meta")),
    }
    with kernels(True):
        attend = packed_attention([1], [9], q, cache, slots)
        attend(q, cache, cache, 0.3)
        for inputs in ((q.bfloat16(), cache, cache), (q, cache.bfloat16(), cache), (q, cache, cache.double())):
            with pytest.raises(TypeError, match="the compiled attention takes float32"):
                attend(*inputs, 0.3)
        for message, inputs in wrong_inputs.items():
            with pytest.raises(ValueError, match=message):
                attend(*inputs, 0.3)
        with pytest.raises(ValueError, match="keys"):
            packed_attention([1], [9], q, cache)(q, cache, cache, 0.3)
        with pytest.raises(ValueError, match=r"there are \[3\] sinks"):
            attend(q, cache, cache, 0.3, PLAIN, torch.zeros(3))
        with pytest.raises(TypeError, match=r"slots are torch\.int64"):
            packed_attention([1], [9], q, cache, slots.long())
        with pytest.raises(ValueError, match=r"slots of shape \[8\] are not one for each of 9 keys"):
            packed_attention([1], [9], q, cache, slots[:8])


@needs_build
def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LIBRARY", Path(_ctypes.__file__))
    one = torch.empty(0, 1, 8)
    with kernels(True), pytest.raises(ImportError, match="was built from other sources: build it again"):
        packed_attention([1], [1], one, one)
