"""Log-probs, entropy and candidates against float64 softmax over all logits and its autograd: with the vocabulary
whole and split, in one chunk and in many."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from miles_spmd.training import output_layer
from miles_spmd.training.log_probs import Distribution, linear_log_probs, log_probs_of, top_candidates
from miles_spmd.training.output_layer import OutputLayer
from tests.ranks import Ranks

ROWS, HIDDEN, VOCAB, PADDED = 9, 6, 11, 14
PLAIN = Distribution()
WARM = Distribution(temperature=1.7)
CUT = Distribution(temperature=0.6, top_p=0.8, top_k=5)
DISTRIBUTIONS = [PLAIN, WARM, Distribution(top_k=3), Distribution(top_p=0.7), CUT]
ONE_ROW, THREE_ROWS = 1, 3 * PADDED  # MAX_LOGITS that make chunks of one row and of some

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def case(dtype: torch.dtype = torch.float32) -> Case:
    """Return hidden states, a weight with rows of padding, targets everywhere in the vocabulary (likely and very
    unlikely ones), and gradients of both outputs. Logits of row 0 are large, of row 1 equal, of row 2 far apart."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    hidden[0] *= 30
    hidden[1] = 0
    hidden[2] *= 60
    weight[VOCAB:] = 100 * hidden[3]  # would take all probability
    targets = torch.tensor([0, 10, 5, 3, 6, 9, 1, 7, 8])
    grads = torch.randn(2, ROWS, generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets, grads[0], grads[1]


def kept_tokens(row: list[float], target: int, distribution: Distribution) -> list[int]:
    """Return the tokens of one row of logits that top-k and top-p keep, equally likely ones together, and the
    target."""
    scaled = [math.exp((x - max(row)) / distribution.temperature) for x in row]
    kept = {target}
    for token, x in enumerate(row):
        above = [s for other, s in zip(row, scaled) if other > x]
        few = distribution.top_k <= 0 or len(above) < distribution.top_k
        likely = distribution.top_p >= 1 or math.fsum(above) / math.fsum(scaled) < distribution.top_p
        if few and likely:
            kept.add(token)
    return sorted(kept)


def oracle(
    hidden: Tensor, weight: Tensor, targets: Tensor, grads: tuple[Tensor, Tensor], distribution: Distribution
) -> list[Tensor]:
    """Return log-probs, entropy and the gradients of hidden states and of the weight, in float64, row by row."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_probs, entropies = [], []
    for row, target in zip(h, targets.tolist()):
        logits = w[:VOCAB] @ row
        kept = kept_tokens(logits.tolist(), target, distribution)
        log_p = (logits[kept] / distribution.temperature).log_softmax(-1)
        log_probs.append(log_p[kept.index(target)])
        entropies.append(-(log_p.exp() * log_p).sum())
    outputs = torch.stack(log_probs), torch.stack(entropies)
    torch.autograd.backward(outputs, [g.double() for g in grads])
    return [*(x.detach() for x in outputs), h.grad, w.grad]


def actual(case: Case, distribution: Distribution, with_entropy: bool, max_logits: int) -> list[Tensor]:
    """Return the same from the code under test: on each rank with its part of the vocabulary, as is the gradient of the
    weight."""
    output_layer.MAX_LOGITS = max_logits
    hidden, weight, targets, grad_log_probs, grad_entropy = case
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    h, w = hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
    log_probs, entropy = linear_log_probs(
        h,
        OutputLayer(w, VOCAB, rank * len(w), dist.group.WORLD if size > 1 else None),
        targets,
        distribution,
        differentiate_entropy=with_entropy,
    )
    assert entropy.requires_grad == with_entropy
    outputs, grads = ([log_probs, entropy], [grad_log_probs, grad_entropy])
    torch.autograd.backward(outputs[: 1 + with_entropy], [g.to(log_probs.dtype) for g in grads[: 1 + with_entropy]])
    output_layer.MAX_LOGITS = 2**27
    return [log_probs.detach(), entropy.detach(), h.grad, w.grad]


def expected(case: Case, distribution: Distribution, with_entropy: bool) -> list[Tensor]:
    hidden, weight, targets, grad_log_probs, grad_entropy = case
    return oracle(hidden, weight, targets, (grad_log_probs, grad_entropy * with_entropy), distribution)


def assert_close(found: list[Tensor], reference: list[Tensor], tolerance: float) -> None:
    """Relative to the largest number of each row: logits of hundreds have no more digits than that."""
    for name, a, b in zip(("log-probs", "entropy", "hidden", "weight"), found, reference, strict=True):
        scale = b.abs().amax(-1, keepdim=True).clamp(min=1.0)
        assert ((a.double() - b).abs() <= tolerance * scale).all(), (name, (a - b).abs().max())


@pytest.mark.parametrize("max_logits", [2**27, THREE_ROWS, ONE_ROW])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_values_and_gradients(distribution: Distribution, with_entropy: bool, max_logits: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        reference = expected(case(dtype), distribution, with_entropy)
        found = actual(case(dtype), distribution, with_entropy, max_logits)
        assert_close(found, reference, tolerance)
        assert {tensor.dtype for tensor in found} == {dtype}
        assert not found[3][VOCAB:].any()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    hidden_size=st.integers(1, 4),
    vocabulary=st.integers(1, VOCAB),
    distribution=st.builds(
        Distribution, st.floats(0.3, 3), st.sampled_from([0.1, 0.5, 0.95, 1.0]), st.sampled_from([-1, 1, 2, 7])
    ),
    max_logits=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
def test_any_shape(
    rows: int, hidden_size: int, vocabulary: int, distribution: Distribution, max_logits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    hidden, weight = torch.randn(rows, hidden_size, **kind), torch.randn(vocabulary, hidden_size, **kind)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    random = (hidden, weight, targets, *torch.randn(2, rows, **kind))
    assert_close(actual(random, distribution, True, max_logits), expected(random, distribution, True), 1e-12)


CASES = list(itertools.product(DISTRIBUTIONS, (False, True), (2**27, THREE_ROWS)))


def split() -> list[list[Tensor]]:
    return [actual(case(), *arguments) for arguments in CASES]


def test_a_split_vocabulary_gives_the_same(ranks: Ranks) -> None:
    """7 tokens on one rank, 4 and padding on the other."""
    for arguments, (log_probs, *parts), (others, *other_parts) in zip(CASES, *ranks.run(2, split), strict=True):
        assert torch.equal(log_probs, others), arguments
        assert all(torch.equal(a, b) for a, b in zip(parts[:2], other_parts[:2], strict=False)), arguments
        found = [log_probs, *parts[:2], torch.cat([parts[2], other_parts[2]])]
        assert_close(found, expected(case(), *arguments[:2]), 1e-6)


@pytest.mark.parametrize("cut", [PLAIN, WARM, Distribution(top_k=4), Distribution(0.9, top_p=0.8)], ids=str)
def test_gradient_of_logits_through_what_transformers_cuts(cut: Distribution) -> None:
    """With the identity as the output layer, hidden states are logits. Targets are sampled from what is left."""
    generator = torch.Generator().manual_seed(1)
    rows, vocabulary = 200, 37
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).requires_grad_()
    z = logits.detach().double().requires_grad_()
    left = z / cut.temperature
    if cut.top_k > 0:
        left = TopKLogitsWarper(cut.top_k)(None, left)
    if cut.top_p < 1:
        left = TopPLogitsWarper(cut.top_p)(None, left)
    log_p = left.log_softmax(-1)
    targets = torch.multinomial(log_p.exp().detach(), 1, generator=generator)
    grads = torch.randn(rows, generator=generator)
    (log_p.gather(1, targets)[:, 0] * grads).sum().backward()
    log_probs, _ = linear_log_probs(logits, OutputLayer(torch.eye(vocabulary), vocabulary), targets[:, 0], cut)
    (log_probs * grads).sum().backward()
    torch.testing.assert_close(log_probs.double(), log_p.gather(1, targets)[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), z.grad, rtol=1e-6, atol=1e-6)


def bf16_gradients_of_weight(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient in one chunk, in many, and exact; other results are checked here."""
    dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(256, 16, generator=generator).to(device, dtype)
    weight = torch.randn(PADDED, 16, generator=generator).to(device, dtype)
    targets = torch.randint(VOCAB, (256,), generator=generator).to(device)
    many = (hidden, weight, targets, torch.ones(256, device=device), torch.zeros(256, device=device))
    logits = (hidden @ weight[:VOCAB].T).double()
    reference = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    whole, chunked = (actual(many, PLAIN, False, max_logits) for max_logits in (2**27, 4 * PADDED))
    for log_probs, entropy, *gradients in (whole, chunked):
        assert log_probs.dtype == entropy.dtype == torch.float32
        assert {gradient.dtype for gradient in gradients} == {dtype}
        torch.testing.assert_close(log_probs.double(), reference, rtol=1e-6, atol=1e-6)
    delta = torch.nn.functional.one_hot(targets, VOCAB) - logits.softmax(-1)
    return whole[3][:VOCAB], chunked[3][:VOCAB], delta.T @ hidden.double()


def relative_error(gradient: Tensor, exact: Tensor) -> float:
    return float(((gradient.double() - exact).abs() / exact.abs().amax(1, keepdim=True)).max())


def test_bf16_is_rounded_once() -> None:
    """fp32 results of the bf16 logits that an engine has; chunks add nothing to the error of the weight's gradient."""
    whole, chunked, exact = bf16_gradients_of_weight("cpu")
    assert torch.equal(chunked, exact.to(torch.bfloat16))
    assert relative_error(whole, exact) <= 2**-7  # of the factors, and of the sum


def test_a_target_out_of_the_cut_stays_possible() -> None:
    """And the other kept tokens lose exactly the probability that it gains."""
    logits = torch.tensor([[3.0, 2.0, 1.0, -1.0]])
    target = torch.tensor([3])
    log_probs, entropy = linear_log_probs(logits, OutputLayer(torch.eye(4), 4), target, Distribution(top_k=2))
    kept = logits[0, [0, 1, 3]].log_softmax(0)
    torch.testing.assert_close(log_probs[0], kept[2])
    torch.testing.assert_close(entropy[0], -(kept.exp() * kept).sum())


def test_no_rows_and_frozen_sides() -> None:
    hidden, weight, targets, *_ = case()
    hidden.requires_grad_()
    log_probs, entropy = linear_log_probs(hidden[:0], OutputLayer(weight, VOCAB), targets[:0], CUT)
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert not hidden.grad.any()
    hidden.grad = None
    for frozen, moving in ((hidden, weight), (weight, hidden)):
        frozen.requires_grad_(False), moving.requires_grad_()
        linear_log_probs(hidden, OutputLayer(weight, VOCAB), targets, PLAIN)[0].sum().backward()
        assert frozen.grad is None
        assert moving.grad is not None
        moving.grad = None


def candidates(max_logits: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    output_layer.MAX_LOGITS = max_logits
    hidden, weight, *_ = case()
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    part = weight.chunk(size)[rank]
    layer = OutputLayer(part, VOCAB, rank * len(part), dist.group.WORLD if size > 1 else None)
    found = []
    for k in (1, 4, VOCAB):
        ids, log_probs = top_candidates(hidden, layer, k, WARM.temperature)
        found.append((ids, log_probs, log_probs_of(hidden, layer, ids.flip(1), WARM.temperature)))
    output_layer.MAX_LOGITS = 2**27
    return found


@pytest.mark.parametrize(("world_size", "max_logits"), [(1, 2**27), (1, THREE_ROWS), (2, 2**27), (2, ONE_ROW)])
def test_candidates(ranks: Ranks, world_size: int, max_logits: int) -> None:
    """Against a stable sort. The tokens of row 1 are all equally likely."""
    hidden, weight, *_ = case(torch.float64)
    log_p = (hidden @ weight[:VOCAB].T / WARM.temperature).log_softmax(-1)
    for found in ranks.run(world_size, candidates, max_logits):
        for ids, log_probs, again in found:
            values, order = (x[:, : ids.shape[1]] for x in log_p.sort(descending=True, stable=True))
            assert torch.equal(ids.long(), order)
            assert (ids.dtype, log_probs.dtype) == (torch.int32, torch.float32)
            scale = values.abs().amax(1, keepdim=True).clamp(min=1.0)
            for actual_log_probs in (log_probs, again.flip(1)):
                assert ((actual_log_probs.double() - values).abs() <= 1e-6 * scale).all()


def test_candidates_that_make_no_sense() -> None:
    hidden, weight, *_ = case()
    with pytest.raises(ValueError, match="12 candidates of a vocabulary of 11 tokens"):
        top_candidates(hidden, OutputLayer(weight, VOCAB), VOCAB + 1, 1.0)


def test_a_rank_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="from 14 on has none of a vocabulary of 11"):
        OutputLayer(case()[1], VOCAB, first_id=PADDED)
