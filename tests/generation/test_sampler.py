"""Seeded sampling: right in distribution, and a function of seed and position alone."""

from __future__ import annotations

import math

import torch

from tests.ranks import Ranks


def distribution() -> None:
    from miles_spmd.generation.sglang.sampler import sample, uniform

    n = 100_000
    probs = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.1, 0.0249, 0.0001])
    log_probs = probs.log().expand(n, -1)
    same, counting = torch.full((n,), 123), torch.arange(n)
    for seeds, positions in [(same, counting), (counting, same), (counting << 40, same), (-counting, counting % 7)]:
        tokens = sample(log_probs, seeds, positions)
        counts = torch.bincount(tokens, minlength=len(probs))
        assert counts[1] == 0
        error = (counts / n - probs).abs()
        assert (error <= 4.5 * (probs * (1 - probs) / n).sqrt()).all()
        numbers = uniform(seeds, positions)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 4.5 / math.sqrt(12 * n)
        neighbours = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
        assert abs(neighbours) < 4.5 / math.sqrt(n)

    # the scale of the weights does not matter, nor where a row stands
    mixed = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    seeds, positions = torch.arange(50) * 0x123456789ABCDEF, torch.arange(50) % 5
    tokens = sample(mixed, seeds, positions)
    assert torch.equal(sample(mixed.flip(0), seeds.flip(0), positions.flip(0)).flip(0), tokens)
    assert torch.equal(sample(mixed + 3, seeds, positions), tokens)
    assert len(set(uniform(seeds, positions).tolist())) == 50


def test_sample(ranks: Ranks) -> None:
    ranks.run(1, distribution)
