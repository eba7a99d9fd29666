"""Attention over packed sequences, by the compiled kernel and in tensor operations, against torch in float64; with keys
in their places and in pages, windows, soft-caps and sinks. Rows do not depend on each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from miles_spmd.invariant import attention, compiled
from miles_spmd.invariant.attention import PaddedAttention, packed_attention
from miles_spmd.models.attention import PLAIN, Form
from tests.invariant import attention_oracle
from tests.invariant.both_ways import kernels, needs_build

HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (3, 1), (8, 1)]  # of queries, of keys
LAYERS = [(Form(1), True), (Form(21), False), (Form(64), True), (Form(0, 2.0), False), (Form(9, 2.0), True)]
CASES = [(heads, PLAIN, False) for heads in HEADS] + [((4, 2), *layer) for layer in LAYERS]  # and whether with sinks


@pytest.fixture(params=[pytest.param("compiled", marks=needs_build), "torch", "torch, cut"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``cut``: with the smallest batches and tiles, into which long sequences are cut."""
    torch.manual_seed(0)
    if request.param == "torch, cut":
        monkeypatch.setattr(attention, "MOST", 1)
    with kernels(request.param == "compiled"):
        one = torch.empty(0, 1, 8)
        assert isinstance(packed_attention([1], [1], one, one), PaddedAttention) == (request.param != "compiled")
        yield


def reference(
    query_lengths: list[int],
    key_lengths: list[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    form: Form = PLAIN,
    sinks: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Return what :func:`packed_attention` computes, in float64 and one sequence at a time."""
    if slots is not None:
        key, value = key[slots.long()], value[slots.long()]
    parts = zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths))
    return torch.cat([attention_oracle.attention(*part, scale, form, sinks)[0] for part in parts])


# new tokens, and keys before them: a context-parallel rank's blocks and an engine's prefixes have some
LENGTHS = st.lists(st.tuples(st.integers(1, 70), st.sampled_from([0, 0, 1, 40, 130])), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LENGTHS, st.sampled_from(HEADS), st.sampled_from([8, 16, 24, 64, 128]))
def test_values_and_gradients(lengths: list[tuple[int, int]], heads: tuple[int, int], dim: int) -> None:
    compare(lengths, heads, dim, dim, PLAIN, False)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    LENGTHS,
    st.sampled_from(HEADS),
    st.sampled_from([(8, 8), (24, 16), (64, 64), (16, 80)]),
    st.builds(Form, st.sampled_from([0, 1, 2, 9, 33, 128, 199, 1000]), st.sampled_from([0.0, 0.5, 30.0])),
    st.booleans(),
)
def test_forms(
    lengths: list[tuple[int, int]], heads: tuple[int, int], dims: tuple[int, int], form: Form, with_sinks: bool
) -> None:
    compare(lengths, heads, *dims, form, with_sinks)


@pytest.mark.parametrize("form", [PLAIN, Form(17, 5.0)])
def test_head_dim_256(form: Form) -> None:
    compare([(40, 0), (20, 40)], (4, 2), 256, 256, form, True)


def compare(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    value_dim: int,
    form: Form,
    with_sinks: bool,
) -> None:
    """Compare values and gradients with the reference."""
    both = [new for new, _ in lengths], [new + before for new, before in lengths]
    torch.manual_seed(0)  # an example that fails has to fail again
    shapes = [(sum(both[i]), heads[i], width) for i, width in ((0, dim), (1, dim), (1, value_dim))]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    sinks = [torch.randn(heads[0], requires_grad=True)] if with_sinks else []
    # not contiguous
    gradient = torch.randn(shapes[0][0], heads[0], value_dim).transpose(0, 1).contiguous().transpose(0, 1)
    layer = dim**-0.5, form, *sinks
    actual = packed_attention(*both, *inputs[:2])(*inputs, *layer)
    expected = reference(*both, *inputs, *layer)
    # scores of up to 4 are sums of dim products, whose roundings add like a random walk
    rounding = max(2e-6, 4 * dim**0.5 * 2**-24)
    torch.testing.assert_close(actual.double(), expected, atol=rounding, rtol=0)
    ours, theirs = (torch.autograd.grad(out, inputs + sinks, gradient.to(out.dtype)) for out in (actual, expected))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "form", "with_sinks"), CASES)
def test_pages(heads: tuple[int, int], form: Form, with_sinks: bool) -> None:
    """Keys anywhere in a cache, whose other slots must not be read, nor those before all windows: they are NaN."""
    both = [3, 1, 70, 1], [3, 90, 129, 33]
    query = torch.randn(75, heads[0], 16)
    slots = torch.randperm(400)[: sum(both[1])].int()
    key, value = (torch.full((400, heads[1], 16), torch.nan) for _ in range(2))
    key[slots.long()], value[slots.long()] = torch.randn(2, len(slots), heads[1], 16)
    layer = 0.3, form, torch.randn(heads[0]) if with_sinks else None
    expected = reference(*both, query, key, value, *layer, slots)
    if form.window:
        for new, keys, of_sequence in zip(*both, slots.long().split(both[1])):
            key[of_sequence[: max(keys - new + 1 - form.window, 0)]] = torch.nan
            value[of_sequence[: max(keys - new + 1 - form.window, 0)]] = torch.nan
    actual = packed_attention(*both, query, key, slots)(query, key, value, *layer)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=0)


def test_values_may_be_the_first_numbers_of_keys() -> None:
    """As in a cache of latent attention."""
    query, cache, slots = torch.randn(3, 4, 24), torch.randn(50, 1, 24), torch.randperm(50)[:29].int()
    attend = packed_attention([1, 2], [9, 20], query, cache, slots)
    value = cache[..., :16]
    assert not value.is_contiguous()
    actual = attend(query, cache, value, 0.3)
    assert torch.equal(actual, attend(query, cache, value.contiguous(), 0.3))
    expected = reference([1, 2], [9, 20], query, cache, value, 0.3, slots=slots)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_what_hides_nothing_changes_nothing(softcap: float) -> None:
    """A window as long as the longest sequence, and sinks of minus infinity."""
    lengths = [37, 150, 1]
    inputs = [torch.randn(sum(lengths), heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    attend, gradient = packed_attention(lengths, lengths, *inputs[:2]), torch.randn(sum(lengths), 4, 16)

    def compute(window: int, sinks: Tensor | None) -> list[Tensor]:
        out = attend(*inputs, 0.25, Form(window, softcap), sinks)
        return [out, *torch.autograd.grad(out, inputs, gradient)]

    plain = compute(0, None)
    for window, sinks in ((150, None), (10**9, None), (0, torch.full((4,), -torch.inf))):
        assert all(map(torch.equal, plain, compute(window, sinks)))
    assert not torch.equal(plain[0], compute(149, None)[0])


@pytest.mark.parametrize(("heads", "form", "with_sinks"), CASES)
@pytest.mark.parametrize("dim", [8, 64])
def test_rows_are_bitwise_equal_in_any_batch(heads: tuple[int, int], dim: int, form: Form, with_sinks: bool) -> None:
    """A sequence alone, among others, and one token at a time over a cache."""
    lengths = [37, 150, 1, 20]
    ends = [*itertools.accumulate(lengths)]
    query = torch.randn(ends[-1], heads[0], dim)
    key, value = torch.randn(2, ends[-1], heads[1], dim)
    layer = 0.2, form, torch.randn(heads[0]) if with_sinks else None

    whole = packed_attention(lengths, lengths, query, key)(query, key, value, *layer)
    for end, length in zip(ends, lengths):
        alone = [x[end - length : end] for x in (query, key, value)]
        assert torch.equal(packed_attention([length], [length], *alone[:2])(*alone, *layer), whole[end - length : end])

    slots = torch.randperm(len(key)).int()
    cache = [torch.empty_like(x).index_copy_(0, slots.long(), x) for x in (key, value)]
    for token in range(max(lengths)):  # of every sequence that has so many
        starts = [end - length for end, length in zip(ends, lengths) if token < length]
        now = torch.stack([query[start + token] for start in starts])
        pages = torch.cat([slots[start : start + token + 1] for start in starts])
        decode = packed_attention([1] * len(starts), [token + 1] * len(starts), now, cache[0], pages)
        assert torch.equal(decode(now, *cache, *layer), torch.stack([whole[start + token] for start in starts]))


@needs_build
@pytest.mark.parametrize(("form", "with_sinks"), [(PLAIN, False), *LAYERS])
def test_gradients_do_not_depend_on_other_sequences(form: Form, with_sinks: bool) -> None:
    """Of the kernel: those of a padded batch are sums over as many rows as it is padded to."""
    lengths = [37, 150, 20]
    stream = [torch.randn(sum(lengths), heads, 16) for heads in (4, 2, 2, 4)]
    layer = 0.2, form, torch.randn(4) if with_sinks else None

    def gradients(lengths: list[int], *stream: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in stream[:3]]
        with kernels(True):
            out = packed_attention(lengths, lengths, *inputs[:2])(*inputs, *layer)
        return torch.autograd.grad(out, inputs, stream[3])

    whole = [x.split(lengths) for x in gradients(lengths, *stream)]
    for s, length in enumerate(lengths):
        alone = gradients([length], *(x.split(lengths)[s] for x in stream))
        assert all(torch.equal(x, y[s]) for x, y in zip(alone, whole))


def test_what_the_kernel_supports(request: pytest.FixtureRequest) -> None:
    built, cpu = request.node.callspec.params["implementation"] == "compiled", torch.device("cpu")
    assert compiled.takes(torch.float32, cpu, 24) == built
    assert not compiled.takes(torch.float32, cpu, 20)
    assert not compiled.takes(torch.bfloat16, cpu, 24)
    assert not compiled.takes(torch.float32, torch.device("cuda"), 24)
