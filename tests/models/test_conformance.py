"""Every family: an engine's log-probs are bitwise the trainer's, and to within rounding those of transformers; what it
generates greedily are transformers' top tokens."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from miles_spmd.models import Family, read_config
from miles_spmd.models.hf_config import count_experts
from tests.models import tiny, two_thetas
from tests.models.conformance import Found, both, difference
from tests.models.two_thetas import TwoThetas
from tests.ranks import Ranks
from tests.weights.test_hugging_face import assert_same

TOLERANCE = 2e-5  # fp32 against float64
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}  # whole experts on each rank
CASES = [(name, 1) for name in tiny.CONFIGS if name not in tiny.BY_HAND]
CASES += [(name, 2) for name in ("gemma3_text", "olmo2", "glm4_moe")]
SLOW = [(name, tp) for name in tiny.CONFIGS for tp in (1, 2) if (name, tp) not in CASES]


def greedy(folder: Path, tp: int, family: type[Family] | None = None, export: Path | None = None) -> Found:
    experts = count_experts(read_config(folder))
    megatron = ({}, TP2, TP2 | EP2)[0 if tp == 1 else 2 if experts else 1]
    short = {"context": 64, "first": 5, "more": 5, "max_new_tokens": 16}
    return both(
        folder, family, megatron, tp_size=tp, ep_size=tp if experts else 1, temperature=0.0, export=export, **short
    )


def reference(name: str) -> transformers.PreTrainedModel:
    """transformers' model in float64, with its norms, which it computes in fp32 whatever the dtype."""
    # Their grouped products take no float64, and their default attention ignores a soft-cap.
    plain = {"experts_implementation": "eager", "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.wide(name), dtype=torch.float64, **plain)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            shift = 1 if "Gemma" in type(module).__name__ else 0
            eps = module.eps if shift else module.variance_epsilon
            module.forward = partial(norm, module.weight + shift, eps)
    return model


def norm(weight: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@torch.no_grad()
def tops(model: transformers.PreTrainedModel, found: Found) -> int:
    """How many of the generated tokens are not transformers' top ones."""
    wrong = 0
    for tokens, log_probs in found.generated:
        top = model(torch.tensor([tokens])).logits[0, :-1].argmax(-1)
        wrong += int((top[-len(log_probs) :] != torch.tensor(tokens[-len(log_probs) :])).sum())
    return wrong


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        *(pytest.param(name, tp, id=f"{name}-TP{tp}") for name, tp in CASES),
        *(pytest.param(name, tp, id=f"{name}-TP{tp}", marks=pytest.mark.slow) for name, tp in SLOW),
    ],
)
def test_engine_and_trainer(ranks: Ranks, tmp_path: Path, name: str, tp: int) -> None:
    answers = ranks.run(tp, greedy, tiny.wide(name), tp, None, tmp_path / "export")
    assert sum(answer.differing for answer in answers) == 0
    model = reference(name)
    assert difference(model, answers[0]) < TOLERANCE
    assert tops(model, answers[0]) == 0
    assert_same(tmp_path / "export", tiny.wide(name))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    source = json.loads((tiny.wide(name) / "config.json").read_text())
    assert config | source == config  # what the source says, and what SGLang reads beside


def test_a_new_family_is_one_short_file(ranks: Ranks, tmp_path: Path) -> None:
    shutil.copytree(tiny.wide("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"second_theta": 77.0, "logit_softcapping": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (found,) = ranks.run(1, greedy, tmp_path, 1, TwoThetas)
    assert found[1:] == (0, 2)
    model = reference("llama")
    changed = copy.deepcopy(model.config)
    changed.rope_parameters["rope_theta"] = 77.0
    rotary = type(model.model.rotary_emb)(changed)

    def turn(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"position_embeddings": rotary(args[0], kwargs["position_ids"])}

    for layer in model.model.layers[1::2]:
        layer.register_forward_pre_hook(turn, with_kwargs=True)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 2.0 * torch.tanh(logits / 2.0))
    assert difference(model, found) < TOLERANCE
    assert len(inspect.getsource(two_thetas).splitlines()) <= 30
