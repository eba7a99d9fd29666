"""When engine and trainer compute the same bits by default, and what is said where they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_spmd.config import checks
from miles_spmd.config.load import load_config
from miles_spmd.models.attention import shared_attention
from tests.config.test_load import errors, recipe  # noqa: F401  (a fixture)

EXACT = "parity=bitwise"
OTHER_ENGINE = "tests.reference_engine:TorchEngine"
HOPPER, CPU = {"9.0"}, set[str]()
TP2 = ["megatron.tensor_model_parallel_size=2", "sglang.tp_size=2"]


def test_parity_names_every_reason_at_once(recipe: Path) -> None:  # noqa: F811
    wrong = ["sglang.kv_cache_dtype=fp8_e5m2", "sglang.quantization=fp8", "rollout_top_p=0.5", "dtype=float32"]
    layout = ["sglang.tp_size=2", "megatron.context_parallel_size=2"]
    found = [message.split(":")[0] for message in errors(recipe, EXACT, *wrong, *layout, world_size=4)]
    assert found == [
        "sglang.kv_cache_dtype",
        "sglang.quantization",
        "megatron.context_parallel_size",
        "determinism.parity",
        "rollout.rollout_top_p",
    ]


@pytest.mark.parametrize(
    ("overrides", "capabilities", "reasons"),
    [
        ([], HOPPER, []),
        ([], None, []),
        ([], CPU, ["model.dtype"]),
        (["dtype=float32"], CPU, []),
        (["dtype=float32"], HOPPER, ["model.dtype"]),
        ([], {"9.0", "8.0"}, ["determinism.parity"]),
        ([], {"8.0"}, ["determinism.parity"]),
        (["parity=bitwise"], {"8.0"}, []),
        (["sglang.attention_backend=fa3"], {"8.0"}, ["sglang.attention_backend", "determinism.parity"]),
        (["sglang.attention_backend=triton"], HOPPER, []),
        (["sglang.attention_backend=torch_native"], HOPPER, ["sglang.attention_backend"]),
        (["mode=sft"], HOPPER, ["run.mode"]),
        (TP2, HOPPER, ["sglang.tp_size"]),
        ([f"engine={OTHER_ENGINE}", "rollout_top_p=0.9"], HOPPER, ["rollout.engine", "rollout.rollout_top_p"]),
        (["sglang.tp_size=2"], HOPPER, ["sglang.tp_size"] * 2),
        (TP2[:1], HOPPER, ["sglang.tp_size"]),
        (["mismatch_budget={max=0.5}"], HOPPER, ["determinism.mismatch_budget"]),
    ],
)
def test_parity_is_on_where_nothing_objects(
    recipe: Path,  # noqa: F811
    overrides: list[str],
    capabilities: set[str] | None,
    reasons: list[str],
) -> None:
    config = load_config(recipe, overrides, world_size=2)
    decided, found = checks.decide_parity(config, capabilities)
    assert decided.determinism.parity == ("off" if reasons else "bitwise")
    assert [reason.split(":")[0] for reason in found] == reasons
    assert decided.model_copy(update={"determinism": config.determinism}) == config


def test_parity_of_long_sequences_is_to_be_asked_for(recipe: Path) -> None:  # noqa: F811
    def parity(dtype: str, response: int, *overrides: str) -> str:
        config = load_config(recipe, [f"dtype={dtype}", *overrides])
        longer = config.rollout.model_copy(update={"rollout_max_response_len": response})
        return checks.decide_parity(config.model_copy(update={"rollout": longer}), None)[0].determinism.parity

    assert parity("bfloat16", 4096) == "bitwise"
    assert parity("bfloat16", 4096, "rollout_max_prompt_len=1") == "off"
    assert parity("bfloat16", 4097, EXACT) == "bitwise"
    assert parity("float32", 4097) == "bitwise"


@pytest.mark.parametrize(("head_dim", "shared"), [(32, False), (64, False), (80, False), (128, True), (192, False)])
def test_head_dim_decides_which_attention_is_shared(recipe: Path, head_dim: int, shared: bool) -> None:  # noqa: F811
    config = recipe.parent / "checkpoint" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"head_dim": head_dim}))
    found = checks.decide_parity(load_config(recipe, ["sglang.attention_backend=fa3"]), HOPPER)[1]
    assert [f"head_dim {head_dim} " in reason for reason in found] == ([] if shared else [True])
    assert checks.decide_parity(load_config(recipe), HOPPER)[1] == []
    assert shared_attention(head_dim, "9.0") == ("fa3" if shared else "triton")
    assert shared_attention(head_dim, "8.0") == "triton"


def test_what_parity_was_asked_for_decides_what_a_mismatch_does(recipe: Path) -> None:  # noqa: F811
    def gate(*overrides: str) -> str | None:
        return checks.decide_parity(load_config(recipe, overrides), HOPPER)[0].determinism.parity_gate

    assert gate() == "warn"
    assert gate("parity_gate=mask") == "mask"
    assert gate(EXACT) is None  # which stops the run
