"""Log-probs and entropy against float64 softmax and its autograd, with the vocabulary whole and split."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from miles_spmd.training.log_probs import log_probs_and_entropy
from tests.ranks import Ranks

POSITIONS, VOCAB = 7, 11


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits with large, equal and very unlikely entries; targets of both halves; gradients of the two outputs."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(POSITIONS, VOCAB, generator=generator)
    logits[0] += 300  # exp overflows without the peak taken off
    logits[1] = 2.0
    logits[2, 3] -= 200  # a probability of 0 in fp32: 0 log 0 must be 0
    targets = torch.tensor([0, 10, 5, 3, 6, 9, 1])
    return logits, targets, torch.randn(POSITIONS, generator=generator), torch.randn(POSITIONS, generator=generator)


def expected(temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets, grad_log_probs, grad_entropy = inputs()
    z = logits.double().requires_grad_()
    log_p = (z / temperature).log_softmax(-1)
    log_probs, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    total = (log_probs * grad_log_probs).sum() + with_entropy * (entropy * grad_entropy).sum()
    (gradient,) = torch.autograd.grad(total, z)
    return log_probs.detach(), entropy.detach(), gradient


def split(temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """On each rank with its slice of the vocabulary, 6 and 5 ids; the gradient is of that slice."""
    logits, targets, grad_log_probs, grad_entropy = inputs()
    first, last = ((0, VOCAB), (0, 6), (6, VOCAB))[dist.get_rank() + dist.get_world_size() - 1]
    z = logits[:, first:last].clone().requires_grad_()
    log_probs, entropy = log_probs_and_entropy(
        z,
        targets,
        temperature=temperature,
        first_id=first,
        group=dist.group.WORLD,
        differentiate_entropy=with_entropy,
    )
    assert entropy.requires_grad == with_entropy
    total = (log_probs * grad_log_probs).sum() + with_entropy * (entropy * grad_entropy).sum()
    total.backward()
    return log_probs.detach(), entropy.detach(), z.grad


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_values_and_gradient(ranks: Ranks, world_size: int, with_entropy: bool, temperature: float) -> None:
    log_probs, entropy, gradient = expected(temperature, with_entropy)
    results = ranks.run(world_size, split, temperature, with_entropy)
    for actual_log_probs, actual_entropy, _ in results:
        torch.testing.assert_close(actual_log_probs.double(), log_probs, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(actual_entropy.double(), entropy, rtol=1e-6, atol=1e-6)
    whole = torch.cat([g for *_, g in results], 1).double()
    torch.testing.assert_close(whole, gradient, rtol=1e-5, atol=1e-6)


def test_bf16_logits_give_fp32_values() -> None:
    logits, targets, *_ = inputs()
    z = logits.bfloat16().requires_grad_()
    log_probs, entropy = log_probs_and_entropy(z, targets)
    assert (log_probs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    reference = z.detach().double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), reference, rtol=1e-6, atol=1e-4)
    log_probs.sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16
