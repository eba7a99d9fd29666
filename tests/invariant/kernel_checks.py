"""Checks of the Triton kernels of norms, rotary positions, SwiGLU, products, digests and attention, on any device.

``TRITON_INTERPRET=1 python -m tests.invariant.kernel_checks`` runs all of it on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from miles_spmd.invariant import kernels
from miles_spmd.invariant.product_kernel import product_fp32
from miles_spmd.invariant.rope import frequencies, rotary_table
from miles_spmd.invariant.split_attention import Keys, attend, decode
from miles_spmd.invariant.split_attention_backward import backward
from miles_spmd.ledger import digest_kernel as digests
from miles_spmd.ledger.rectangles import parts
from miles_spmd.ledger.tensor_sums import TensorSums
from miles_spmd.models.attention import PLAIN, Form
from miles_spmd.models.layout import Piece, TensorLayout, whole
from miles_spmd.models.rope import Rope
from tests.invariant import attention_oracle

DTYPES = (torch.float32, torch.bfloat16)
FORMS = ((Form(20), False), (Form(1, 2.0), True), (Form(1000, 30.0), True))  # and whether with sinks


def near(actual: Tensor, expected: Tensor) -> None:
    """Assert equality to within one rounding, or the error of sums in fp32. Triton's interpreter truncates where a GPU
    rounds."""
    tolerance = 2**-7 if actual.dtype == torch.bfloat16 else 5e-6
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def randn(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def check_norm(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    x, residual, gradient = randn(3, rows, width, device=device, dtype=dtype)
    weight = randn(width, device=device, dtype=dtype)
    y, r, total = kernels.rms_norm(x, weight, 1e-6, residual)
    assert total is not None
    near(total, x.double() + residual.double())
    if device != "cpu":
        assert torch.equal(total, x + residual), "rounded before it is squared"

    exact, w = total.double().requires_grad_(), weight.double().requires_grad_()
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w
    near(y, expected.detach())
    found = kernels.rms_norm_backward(gradient, total, weight, r)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (exact, w), gradient.double())):
        near(ours, theirs)

    plain, again, _ = kernels.rms_norm(total, weight, 1e-6, None)
    assert torch.equal(plain, y), "with and without the addition"
    assert torch.equal(again, r)
    one = kernels.rms_norm(total[rows // 2 :][:1], weight, 1e-6, None)[0]
    assert torch.equal(one[0], y[rows // 2]), "a row alone"
    assert all(map(torch.equal, found, kernels.rms_norm_backward(gradient, total, weight, r))), "the same again"


def check_rotation(
    device: str, dtype: torch.dtype, tokens: int, heads: int, width: int, rotary_dim: int = 0, interleaved: bool = False
) -> None:
    """``rotary_dim``: how many numbers of a head are rotated, by default all of them."""
    rotary_dim = rotary_dim or width
    wide = randn(tokens, heads + 3, width, device=device, dtype=dtype)
    x = wide[:, 1 : heads + 1]  # a slice, as queries are of one product
    positions = torch.arange(tokens, device=device).mul(7) % 50
    steps = frequencies(Rope(1e4, rotary_dim), 50).to(device)
    table = rotary_table(steps, 50)
    head, side = x.double(), -1 if interleaved else -2  # the dimension of a pair's two numbers
    pairs = head[..., :rotary_dim].unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(side)
    for back in (False, True):
        angles = positions[:, None, None].double() * steps.double() * (-1 if back else 1)
        turned = torch.complex(*pairs) * torch.polar(torch.ones_like(angles), angles)
        expected = torch.stack([turned.real, turned.imag], side).flatten(-2)
        found = kernels.rotate(x, table, positions, interleaved, back)
        near(found, torch.cat([expected, head[..., rotary_dim:]], -1))
        assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])


def check_swiglu(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    x, gradient = randn(rows, 2 * width, device=device, dtype=dtype), randn(rows, width, device=device, dtype=dtype)
    exact = x.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    expected = silu(gate) * up
    near(kernels.swiglu(x), expected.detach())
    near(kernels.swiglu_backward(gradient, x), torch.autograd.grad(expected, exact, gradient.double())[0])


def check_product(device: str, dtype: torch.dtype, rows: int, columns: int, depth: int) -> None:
    """A result in fp32, of which a row depends on nothing else."""
    x, weight = (randn(n, depth, device=device, dtype=dtype) for n in (rows, columns))
    found = product_fp32(x, weight)
    assert found.dtype is torch.float32
    near(found, x.double() @ weight.double().T)
    for start, count in ((0, 1), (rows // 3, 3), (rows // 2, rows - rows // 2)):
        assert torch.equal(product_fp32(x[start : start + count].clone(), weight), found[start : start + count])
    assert torch.equal(product_fp32(x.float(), weight), product_fp32(x.float(), weight.float()))


def check_digests(device: str, dtype: torch.dtype, columns: int) -> None:
    """Two tensors in one launch, one of which holds parts of two checkpoint tensors, have the sums of the CPU code."""
    a, b = randn(70, columns, device="cpu", dtype=dtype), randn(columns, device="cpu", dtype=dtype)
    cut = columns // 2 // 8 * 8
    pieces = Piece("A", (3, 5), (0, 0), (70, cut)), Piece("B", (0, 0), (0, cut), (70, columns - cut))
    of = {"a": parts(TensorLayout("a", pieces), a.shape), "b": parts(TensorLayout("b", whole("b", b.shape)), b.shape)}
    located = [(number, part) for number, name in enumerate(of) for part in of[name]]
    held = [tensor.to(device) for tensor in (a, b)]
    addresses = torch.tensor([tensor.data_ptr() for tensor in held], device=device)
    table = digests.tiles(located)
    expected = TensorSums(of)({"a": a, "b": b})
    for aligned in {False, digests.even(table)}:
        sums = torch.zeros_like(expected, device=device)
        digests.add_sums(addresses, a.element_size(), torch.from_numpy(table).to(device), sums, aligned)
        assert torch.equal(sums.cpu(), expected)


def check_attention(
    device: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    width: int,
    split: int,
    form: Form = PLAIN,
    with_sinks: bool = False,
) -> None:
    """Compare a packed sequence's rows and gradients with an oracle; the same rows decoded from pages of a cache are
    bitwise equal, and what lies before a window is not read."""
    lengths = [split + 5, 1, 2 * split, 2 * split - 1, 7]
    tokens, (h, g), scale = sum(lengths), heads, width**-0.5
    query, key, value = (randn(tokens, n, width, device=device, dtype=dtype) for n in (h, g, g))
    sinks = randn(h, device=device, dtype=dtype) if with_sinks else None
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    counts, begin = torch.tensor(lengths, dtype=torch.int32, device=device), starts[:-1].long()
    in_order = torch.arange(tokens, dtype=torch.int32, device=device)
    layer = scale, split, form, sinks
    out, lse = attend(query, Keys(key, value, counts, in_order, begin), starts, max(lengths), *layer)
    if form.window > max(lengths):
        unlimited = scale, split, form._replace(window=0), sinks
        again, _ = attend(query, Keys(key, value, counts, in_order, begin), starts, max(lengths), *unlimited)
        assert device != "cpu" or torch.equal(again, out), "a window that hides nothing"
    gradient = randn(tokens, h, width, device=device, dtype=dtype)
    longest = max(lengths), max(lengths)
    found = backward(gradient, query, key, value, out, lse, (starts, starts), longest, scale, form)
    theirs = []
    for first, length in zip(begin.tolist(), lengths):
        part = slice(first, first + length)
        exact = [x[part].double().requires_grad_() for x in (query, key, value)]
        expected, sums = attention_oracle.attention(*exact, scale, form, sinks)
        near(out[part], expected.detach())
        near(lse[:, part], sums.detach())
        theirs.append(torch.autograd.grad(expected, exact, gradient[part].double()))
    for ours, parts_of_theirs in zip(found, zip(*theirs)):  # of all at once: those of a sequence of one token are 0
        near(ours, torch.cat(parts_of_theirs))

    slots = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(0))[:tokens].to(device)
    cache = randn(2, 2 * tokens, g, width, device=device, dtype=dtype)
    cache[:, slots] = torch.stack((key, value))
    for end, length in zip(starts[1:].tolist(), lengths):
        if form.window:  # of the five last queries
            cache[:, slots[end - length : max(end - form.window - 4, end - length)]] = torch.nan
    table = torch.zeros(len(lengths), max(lengths) + 3, dtype=torch.int32, device=device)
    for row, first, length in zip(table, begin.tolist(), lengths):
        row[:length] = slots[first : first + length]
    row_starts = torch.arange(len(lengths), device=device) * table.stride(0)
    pages = Keys(*cache, counts, table.view(-1), row_starts)
    last = (starts[1:] - 1).long()
    decoded = decode(query[last], pages, 3 * split, *layer)
    assert torch.equal(decoded, out[last]), "decoded"
    tails = [min(5, length) for length in lengths]  # as in chunked prefill
    rows = torch.cat([torch.arange(end - tail + 1, end + 1) for end, tail in zip(last.tolist(), tails)]).to(device)
    chunks = torch.tensor([0, *tails], device=device).cumsum(0).int()
    assert torch.equal(attend(query[rows], pages, chunks, 5, *layer)[0], out[rows]), "in chunks"


def main() -> None:
    kernels.PARTS, kernels.TILE = 4, 256
    digests.ROWS, digests.COLUMNS = 8, 128
    for dtype in DTYPES:
        for rows, width in ((1, 64), (9, 100), (11, 300)):
            check_norm("cpu", dtype, rows, width)
        for rotary_dim, interleaved in ((20, False), (20, True), (12, False), (6, True)):
            check_rotation("cpu", dtype, 5, 3, 20, rotary_dim, interleaved)
        check_swiglu("cpu", dtype, 3, 300)
        for columns in (304, 301):
            check_digests("cpu", dtype, columns)
    check_product("cpu", torch.float32, 70, 40, 200)  # the interpreter has no products in bf16
    for heads, width in (((4, 2), 16), ((6, 2), 80)):
        check_attention("cpu", torch.float32, heads, width, 32)
    for form, with_sinks in FORMS:
        check_attention("cpu", torch.float32, (4, 2), 16, 32, form, with_sinks)
    print("done")


if __name__ == "__main__":
    main()
