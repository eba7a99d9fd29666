"""Plain routing against Megatron's function, mixtures against a plain loop. ``tests/gpu`` runs the same on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from miles_spmd.invariant.expert_kernels import arrange, top_k
from miles_spmd.invariant.experts import choose, mix
from miles_spmd.invariant.linear import linear_fp32
from miles_spmd.models.blocks.experts import Router
from miles_spmd.platform import cpu

cpu.install()

from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function  # noqa: E402

EXPERTS, HIDDEN, WIDTH = 16, 64, 32


def chosen(tokens: int, k: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return weights and experts chosen by logits with many ties, as bf16 routers have them."""
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens)).mul(4).round().to(device)
    return choose(logits, Router(EXPERTS, k, softmax_first=False))


def assert_arranged_as_by_a_loop(tokens: int, device: str) -> None:
    """On an engine's rank that has the first half of the experts."""
    weights, experts = chosen(tokens, 4, device)
    local = EXPERTS // 2
    found = arrange(torch.where(experts < local, experts, -1), weights, local)
    rows = [(e, t, i) for e in range(local) for t in range(tokens) for i in range(4) if experts[t, i] == e]
    assert found.tokens[: len(rows)].tolist() == [t for _, t, _ in rows]
    assert found.weights[: len(rows)].tolist() == [weights[t, i].item() for _, t, i in rows]
    places = torch.full((tokens, 4), -1)
    for place, (_, t, i) in enumerate(rows):
        places[t, i] = place
    assert torch.equal(found.places.cpu(), places.sort(1).values)
    assert found.ends.tolist() == [sum(e <= expert for e, _, _ in rows) for expert in range(local)]


def assert_mixed_as_by_a_loop(tokens: int, dtype: torch.dtype, device: str, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, gate_up, down = (
        torch.randn(shape, generator=generator).mul(shape[-1] ** -0.5).to(device, dtype)
        for shape in ((tokens, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    )
    weights, experts = chosen(tokens, 4, device)
    found = mix(hidden, experts, weights, gate_up, down)
    expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for t in range(tokens):
        for expert, weight in zip(experts[t].tolist(), weights[t].tolist()):
            gate, up = (gate_up[expert].double() @ hidden[t].double()).chunk(2)
            expected[t] += (down[expert].double() @ (silu(gate) * up * weight)).cpu()
    assert (found.double().cpu() - expected).norm() / expected.norm() < tolerance
    some = slice(tokens // 3, tokens // 3 + 2)  # bitwise equal among fewer
    assert torch.equal(mix(hidden[some], experts[some], weights[some], gate_up, down), found[some])


class FirstOfEqual:
    """Stands in for Megatron's replay of routing, where Megatron asks for the experts to choose."""

    @staticmethod
    def get_replay_topk(scores: Tensor, k: int, *_: object) -> tuple[Tensor, Tensor]:
        experts = top_k(scores.detach(), k)[1]
        return scores.gather(1, experts), experts


def assert_chosen_as_by_megatron(softmax_first: bool, dtype: torch.dtype, device: str) -> None:
    """And the same bitwise with a gradient, as the trainer chooses."""
    logits = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)).mul(4).to(device, dtype)
    logits[::2].round_()  # with many ties
    router = Router(128, 8, softmax_first=softmax_first)
    weights, experts = choose(logits, router)
    options = {"use_pre_softmax": softmax_first, "router_replay": FirstOfEqual()}
    probabilities, mask = topk_routing_with_score_function(logits.float(), 8, **options)
    assert torch.equal(mask.nonzero()[:, 1].view(-1, 8), experts.sort(1).values)
    assert torch.equal(probabilities.gather(1, experts), weights)
    again = choose(logits.float().requires_grad_(), router)
    assert all(map(torch.equal, again, (weights, experts)))


def assert_logits_in_fp32(dtype: torch.dtype, device: str) -> None:
    """Products in fp32 of numbers of any dtype; a row's depend on nothing else."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((300, 200), (70, 200), (70,)))
    found = linear_fp32(x, weight, bias)
    assert found.dtype is torch.float32
    exact = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    for start, count in ((0, 1), (17, 3), (250, 50)):
        assert torch.equal(linear_fp32(x[start : start + count].clone(), weight, bias), found[start : start + count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_fp32(dtype: torch.dtype) -> None:
    assert_logits_in_fp32(dtype, "cpu")


@pytest.mark.parametrize("softmax_first", [False, True])
def test_tokens_choose_as_megatrons(softmax_first: bool) -> None:
    assert_chosen_as_by_megatron(softmax_first, torch.float32, "cpu")


@pytest.mark.parametrize("tokens", [1, 50])
def test_rows_are_arranged(tokens: int) -> None:
    assert_arranged_as_by_a_loop(tokens, "cpu")


@pytest.mark.parametrize("tokens", [2, 50])
def test_mixtures(tokens: int) -> None:
    assert_mixed_as_by_a_loop(tokens, torch.float32, "cpu", 1e-6)
