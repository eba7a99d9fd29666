"""Routers of every kind: against transformers' modules, float64 and themselves. ``tests/gpu`` runs a part on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from miles_spmd.invariant.experts import choose
from miles_spmd.models.blocks.experts import Router
from miles_spmd.platform import cpu

cpu.install()

import transformers  # noqa: E402
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter  # noqa: E402
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter  # noqa: E402
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter  # noqa: E402

E, K, HIDDEN, TOKENS = 24, 4, 32, 400
DEEPSEEK = {"n_routed_experts": E, "num_experts_per_tok": K, "hidden_size": HIDDEN, "moe_intermediate_size": 8}
GROUPS = {"n_group": 6, "topk_group": 3}
IN_GROUPS = {"groups": 6, "groups_per_token": 3}


class Case(NamedTuple):
    router: Router
    # logits and the correction bias -> transformers' experts and weights, [T, k] each
    theirs: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def returns_its_logits(module: type, config: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """transformers' module with an identity as its weight, so that hidden states are its logits."""

    def theirs(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        config.hidden_size = E
        router = module(config)
        with torch.no_grad():
            router.weight.copy_(torch.eye(E))
        _, weights, experts = router(logits, bias) if module is MiniMaxM2TopKRouter else router(logits)
        return experts, weights

    return theirs


def deepseek(kind: type, config: Any, method: str | None = None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def theirs(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        moe = kind(config)
        if method is None:
            moe.gate.e_score_correction_bias.copy_(bias)
            return moe.route_tokens_to_experts(logits)
        moe.topk_method, moe.num_experts = method, E
        return moe.route_tokens_to_experts(logits[None])

    return theirs


def v3(**changes: Any) -> Any:
    return transformers.DeepseekV3Config(**DEEPSEEK | {"routed_scaling_factor": 2.5} | changes)


SIGMOID = {"scores": "sigmoid", "bias": True, "normalize": True}
CASES = {
    "qwen2_moe": Case(
        Router(E, K),
        returns_its_logits(Qwen2MoeTopKRouter, transformers.Qwen2MoeConfig(num_experts=E, num_experts_per_tok=K)),
    ),
    "qwen2_moe, normalised": Case(
        Router(E, K, softmax_first=False),
        returns_its_logits(
            Qwen2MoeTopKRouter, transformers.Qwen2MoeConfig(num_experts=E, num_experts_per_tok=K, norm_topk_prob=True)
        ),
    ),
    "mixtral": Case(
        Router(E, K, softmax_first=False),
        returns_its_logits(MixtralTopKRouter, transformers.MixtralConfig(num_local_experts=E, num_experts_per_tok=K)),
    ),
    "gpt_oss": Case(
        Router(E, K, softmax_first=False, logit_bias=True),
        returns_its_logits(GptOssTopKRouter, transformers.GptOssConfig(num_local_experts=E, num_experts_per_tok=K)),
    ),
    "minimax_m2": Case(
        Router(E, K, **SIGMOID, logit_dtype="fp32"),
        returns_its_logits(
            MiniMaxM2TopKRouter, transformers.MiniMaxM2Config(num_local_experts=E, num_experts_per_tok=K)
        ),
    ),
    "deepseek_v2": Case(
        Router(E, K, scale=16.0),
        deepseek(DeepseekV2Moe, transformers.DeepseekV2Config(**DEEPSEEK, routed_scaling_factor=16.0), method="greedy"),
    ),
    "deepseek_v2, groups": Case(
        Router(E, K, **IN_GROUPS, scale=16.0),
        deepseek(
            DeepseekV2Moe,
            transformers.DeepseekV2Config(**DEEPSEEK, **GROUPS, routed_scaling_factor=16.0),
            method="group_limited_greedy",
        ),
    ),
    "deepseek_v3": Case(
        Router(E, K, **SIGMOID, **IN_GROUPS, best_of_group=2, scale=2.5),
        deepseek(DeepseekV3MoE, v3(**GROUPS, norm_topk_prob=True)),
    ),
    "deepseek_v3, not normalised": Case(
        Router(E, K, **SIGMOID | {"normalize": False}, **IN_GROUPS, best_of_group=2, scale=2.5),
        deepseek(DeepseekV3MoE, v3(**GROUPS, norm_topk_prob=False)),
    ),
    "glm4_moe": Case(
        Router(E, K, **SIGMOID, scale=1.5),
        deepseek(
            Glm4MoeMoE,
            transformers.Glm4MoeConfig(
                **DEEPSEEK, n_group=1, topk_group=1, routed_scaling_factor=1.5, norm_topk_prob=True
            ),
        ),
    ),
}


def inputs(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits, of which half have many equal ones, and a correction bias."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, E, generator=generator).mul(2)
    logits[::2] = logits[::2].round()
    return logits.to(device), torch.randn(E, generator=generator).mul(0.1).to(device)


def by_formula(logits: Tensor, router: Router, experts: Tensor) -> Tensor:
    """Weights of chosen experts, in the dtype of the logits."""
    scores = logits.sigmoid() if router.scores == "sigmoid" else logits.softmax(-1)
    chosen = scores.gather(1, experts)
    if router.normalize or not router.softmax_first:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return chosen * router.scale


def assert_gradient(case: Case, device: str) -> None:
    logits, bias = inputs(device)
    logits.requires_grad_()
    weights, experts = choose(logits, case.router, bias.requires_grad_())
    gradient = torch.randn_like(weights)
    weights.backward(gradient)
    exact = logits.detach().double().requires_grad_()
    by_formula(exact, case.router, experts).backward(gradient.double())
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert bias.grad is None, "a choice has no gradient"


def assert_rows_depend_on_themselves_alone(case: Case, device: str) -> None:
    """And are bitwise equal with a gradient, as the trainer's are, and without, as the engine's."""
    logits, bias = inputs(device)
    weights, experts = choose(logits, case.router, bias)
    again = choose(logits.clone().requires_grad_(), case.router, bias)
    assert all(map(torch.equal, again, (weights, experts)))
    alone = [(start, 1) for start in range(1, 100)]
    for start, count in (*alone, (13, 5), (100, 37), (TOKENS - 3, 3)):
        some = slice(start, start + count)
        assert all(map(torch.equal, choose(logits[some].clone(), case.router, bias), (weights[some], experts[some])))


@pytest.mark.parametrize("name", CASES)
def test_as_transformers(name: str) -> None:
    (router, theirs), (logits, bias) = CASES[name], inputs()
    weights, experts = choose(logits, router, bias)
    expected_experts, expected = theirs(logits, bias)
    order, expected_order = experts.sort(1), expected_experts.sort(1)
    assert torch.equal(order.values, expected_order.values)
    torch.testing.assert_close(
        weights.gather(1, order.indices), expected.detach().gather(1, expected_order.indices), rtol=0, atol=1e-6
    )
    assert weights.dtype is torch.float32


@pytest.mark.parametrize("name", CASES)
def test_gradient(name: str) -> None:
    assert_gradient(CASES[name], "cpu")


@pytest.mark.parametrize("name", CASES)
def test_rows_depend_on_themselves_alone(name: str) -> None:
    assert_rows_depend_on_themselves_alone(CASES[name], "cpu")


def test_scores_of_0_have_weights() -> None:
    """Of logits so low that every sigmoid is 0, weights are 0, not NaN."""
    weights, _ = choose(torch.full((1, E), -200.0), Router(E, K, **SIGMOID), torch.zeros(E))
    assert torch.equal(weights, torch.zeros(1, K))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 3, "per_token": 4}, "4 of 3 experts"),
        ({"scores": "sigmoid", "softmax_first": False}, "softmax_first=False is for"),
        ({"normalize": True}, "softmax_first=False has the same weights"),
        ({"groups": 5}, "24 experts cannot be divided into 5 groups"),
        ({"groups": 8, "groups_per_token": 1}, "4 experts cannot be chosen from 1 of 8 groups of 3"),
        ({"groups": 8, "groups_per_token": 9}, "4 experts cannot be chosen from 9 of 8"),
        ({"groups": 8, "groups_per_token": 4, "best_of_group": 4}, "a group of 3 experts has no 4 best"),
        ({"groups_per_token": 2}, "are for several groups"),
    ],
)
def test_descriptions_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(**{"count": E, "per_token": K} | values)
