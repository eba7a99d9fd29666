"""Twenty updates with Adam: the same losses in every layout, and those of transformers with torch's AdamW."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import tiny
from tests.ranks import Ranks
from tests.training.cases import CP2, EP2, PP2, SP, TP2, VPP2, ZERO, config, losses, oracle_scores, sequences

BATCH = sequences((5, 17, 40, 9, 30, 31, 2, 12))
STEPS = 20
ADAM = {"lr": 3e-3, "weight_decay": 0.1, "clip_grad": 1.0, "adam_beta2": 0.98}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP2+SP": (2, TP2 | SP),
    "PP2": (2, PP2),
    "VPP2": (2, PP2 | VPP2),
    "CP2": (2, CP2),
    "DP2": (2, {}),
    "DP2+distributed": (2, ZERO),
    "DP2+distributed+overlap": (2, ZERO | OVERLAP),
    "TP2+SP+DP2+distributed": (4, TP2 | SP | ZERO),
    "EP2": (2, EP2),
    "EP2+distributed": (2, EP2 | ZERO),
}
DENSE = [layout for layout in LAYOUTS if "EP2" not in layout]
CASES = [*(("qwen3-tied", layout) for layout in DENSE)] + [
    ("qwen3_moe", layout) for layout in ("one", "EP2", "EP2+distributed")
]


@cache
def oracle(name: str) -> list[float]:
    """Supervised loss with global weights; norms and other vectors without weight decay, as Megatron has it."""
    model = tiny.build(name)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], 3e-3, (0.9, 0.98)
    )
    history = []
    for _ in range(STEPS):
        log_probs = [oracle_scores(model, s.tokens)[0] for s in BATCH]
        loss = -torch.stack([(torch.from_numpy(s.loss_weights) * p)[1:].sum() for s, p in zip(BATCH, log_probs)]).sum()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize(("name", "layout"), CASES, ids=[f"{name}-{layout}" for name, layout in CASES])
def test_twenty_updates(ranks: Ranks, name: str, layout: str) -> None:
    world_size, table = LAYOUTS[layout]
    run = config(name, table | ADAM, run={"mode": "sft", "num_rollout": STEPS})
    micro_batches = {"VPP2": 4, "PP2": 2}.get(layout, 1)
    everywhere = ranks.run(world_size, losses, run, BATCH, STEPS, micro_batches)
    assert all(history == everywhere[0] for history in everywhere)
    expected = oracle(name)
    assert expected[-1] < 0.5 * expected[0]
    np.testing.assert_allclose(everywhere[0], expected, rtol=1e-5)
