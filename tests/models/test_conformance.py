"""Every family: an engine's log-probs are bitwise the trainer's, and to within rounding those of transformers; what it
generates greedily are transformers' top tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from miles_spmd.models import load_family
from tests.models import tiny
from tests.models.conformance import Found, both, difference
from tests.ranks import Ranks

TOLERANCE = 2e-5  # fp32 against float64
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}  # whole experts on each rank
CASES = [(name, tp) for name in tiny.CONFIGS for tp in (1, 2)]


def greedy(folder: Path, tp: int) -> Found:
    experts = load_family(folder).transformer_config().get("num_moe_experts")
    megatron = ({}, TP2, TP2 | EP2)[0 if tp == 1 else 2 if experts else 1]
    short = {"context": 64, "first": 5, "more": 5, "max_new_tokens": 16}
    return both(folder, None, megatron, tp_size=tp, ep_size=tp if experts else 1, temperature=0.0, **short)


def reference(name: str) -> transformers.PreTrainedModel:
    loop = {"experts_implementation": "eager"}  # their grouped products take no float64
    return transformers.AutoModelForCausalLM.from_pretrained(tiny.wide(name), dtype=torch.float64, **loop)


@torch.no_grad()
def tops(model: transformers.PreTrainedModel, found: Found) -> int:
    """How many of the generated tokens are not transformers' top ones."""
    wrong = 0
    for tokens, log_probs in found.generated:
        top = model(torch.tensor([tokens])).logits[0, :-1].argmax(-1)
        wrong += int((top[-len(log_probs) :] != torch.tensor(tokens[-len(log_probs) :])).sum())
    return wrong


@pytest.mark.parametrize(("name", "tp"), CASES, ids=[f"{name}-TP{tp}" for name, tp in CASES])
def test_engine_and_trainer(ranks: Ranks, name: str, tp: int) -> None:
    answers = ranks.run(tp, greedy, tiny.wide(name), tp)
    assert sum(answer.differing for answer in answers) == 0
    model = reference(name)
    assert difference(model, answers[0]) < TOLERANCE
    assert tops(model, answers[0]) == 0
