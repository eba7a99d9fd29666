"""The trainer against transformers: log-probs, loss and gradient of every family in every layout."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from miles_spmd.types.train_sequence import TrainSequence
from tests.models import tiny
from tests.ranks import Ranks
from tests.training.cases import (
    CP2,
    EP2,
    ETP1,
    PLAIN_SGD,
    PP2,
    SP,
    TP2,
    VPP2,
    Step,
    config,
    one_step,
    oracle_gradient,
    oracle_scores,
    sequences,
    unshare,
    whole_weights,
)

BATCH = sequences((5, 17, 40, 9, 30, 31, 2, 12))
TEMPERATURE = 0.7
ALGORITHM = {"eps_clip": 0.1, "eps_clip_high": 0.3, "entropy_coef": 0.05, "kl_loss_coef": 0.1, "kl_loss_type": "k3"}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP2": (2, TP2),
    "TP2+SP": (2, TP2 | SP),
    "PP2": (2, PP2),
    "VPP2": (2, PP2 | VPP2),
    "CP2": (2, CP2),
    "DP2": (2, {}),
    "EP2": (2, EP2),
    "TP2+SP+PP2": (4, TP2 | SP | PP2),
    "TP2+SP+CP2": (4, TP2 | SP | CP2),
    "TP2+SP+EP2": (2, TP2 | SP | EP2 | ETP1),
    "PP2+EP2": (4, PP2 | EP2),
}
DENSE = ["one", "TP2", "TP2+SP", "PP2", "VPP2", "CP2", "DP2"]
NEW = ("mistral", "phi3", "gemma2", "gemma3_text", "olmo2", "glm4")
NEW_EXPERTS = ("mixtral", "qwen2_moe", "glm4_moe")
CASES = [
    *(("qwen3", layout) for layout in (*DENSE, "TP2+SP+PP2", "TP2+SP+CP2")),
    *(("qwen3-tied", layout) for layout in ("one", "TP2+SP", "VPP2")),
    *((name, layout) for name in ("qwen2", "llama") for layout in ("one", "TP2+SP", "PP2", "CP2", "DP2")),
    *(("qwen3_moe", layout) for layout in ("one", "TP2+SP", "EP2", "TP2+SP+EP2", "CP2", "PP2+EP2")),
    *((name, "one") for name in (*NEW, *NEW_EXPERTS)),
    *((name, "TP2+SP") for name in ("gemma2", "olmo2")),
    *((name, "EP2") for name in ("qwen2_moe", "glm4_moe")),
]
SLOW = [
    case
    for name in (*NEW, *NEW_EXPERTS)
    for layout in ("TP2+SP", "PP2", "CP2")
    if (case := (name, layout)) not in CASES
]
SLOW += [("mixtral", "EP2")]


def policy_loss(sequence: TrainSequence, log_probs: Tensor, entropy: Tensor) -> Tensor:
    """Return the loss of one sequence, written from the papers: PPO's clip with two bounds, entropy bonus, k3 of
    KL(policy || ref)."""
    weights, advantages, old, ref = (
        torch.from_numpy(x)
        for x in (sequence.loss_weights, sequence.advantages, sequence.old_log_probs, sequence.ref_log_probs)
    )
    ratio = (log_probs - old).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.3) * advantages)
    kl = (ref - log_probs).exp() - 1 - (ref - log_probs)
    return (weights * (-surrogate - 0.05 * entropy + 0.1 * kl))[1:].sum()


@cache
def oracle(name: str) -> tuple[list[np.ndarray], float, dict[str, np.ndarray]]:
    model = tiny.build(name)
    with torch.no_grad():
        log_probs = [oracle_scores(model, s.tokens, TEMPERATURE)[0].numpy() for s in BATCH]
    return log_probs, *oracle_gradient(name, BATCH, policy_loss, TEMPERATURE)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(pytest.param(*case, id="-".join(case)) for case in CASES),
        *(pytest.param(*case, id="-".join(case), marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_log_probs_loss_and_gradient(ranks: Ranks, name: str, layout: str) -> None:
    world_size, table = LAYOUTS[layout]
    run = config(name, table | PLAIN_SGD, rollout={"rollout_temperature": TEMPERATURE}, algorithm=ALGORITHM)
    count = 4 if layout == "VPP2" else 2  # with two, interleaved stages never have two messages in flight
    steps: list[Step] = ranks.run(world_size, one_step, run, BATCH, count)

    log_probs, loss, gradient = oracle(name)
    for sequence, expected, actual in zip(BATCH, log_probs, unshare(BATCH, steps, count), strict=True):
        scored = sequence.loss_weights != 0
        scored[0] = False
        np.testing.assert_allclose(actual, np.where(scored, expected, 0), rtol=0, atol=3e-6)

    assert sum(s.sums.get("loss", 0.0) for s in steps) == pytest.approx(loss, abs=2e-6)
    assert sum(s.sums.get("tokens", 0.0) for s in steps) == sum((s.loss_weights[1:] != 0).sum() for s in BATCH)

    before = whole_weights(name, [s.before for s in steps])
    after = whole_weights(name, [s.after for s in steps])
    assert gradient.keys() <= before.keys()
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
    assert [s.grad_norm for s in steps] == pytest.approx([norm] * world_size, rel=1e-5)
    for tensor, expected in gradient.items():
        # a weight of size 1 moves by its gradient to within 6e-8; the rest is fp32 summation order
        np.testing.assert_allclose(before[tensor] - after[tensor], expected, rtol=1e-4, atol=2e-6, err_msg=tensor)
