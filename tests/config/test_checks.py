"""Every rule about settings that contradict each other, and Megatron's own word on the same combinations."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config import checks
from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.types.run_files import NO_ROWS
from tests.config.test_load import errors, recipe  # noqa: F401  (a fixture)
from tests.ranks import Ranks

TE = "megatron.transformer_impl=transformer_engine"
EXACT = "parity=bitwise"
JUDGED = "rm_type=judge judge_prompt={response} judge_hf_checkpoint=gone"
JUDGE = f"{JUDGED} judge_num_gpus=1"
SECOND = "environment.environment=games:play second_num_gpus=1 second_roles=['b']"
OTHER_ENGINE = "tests.reference_engine:TorchEngine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "rollout_batch_size=4 n_samples_per_prompt=4 global_batch_size=6",
            "train.global_batch_size: 6 does not divide",
        ),
        ("n_samples_per_prompt=1", "grpo compares the responses to a prompt"),
        ("advantage_estimator=rloo n_samples_per_prompt=1", "rloo compares the responses to a prompt"),
        ("use_tis=true use_rollout_logprobs=true", "nothing is left to correct"),
        ("keep_last=2 keep_best=eval/other", "checkpoint.keep_best: 'eval/other' is not a metric of an evaluation set"),
        ("tis_clip_low=3", "algorithm.tis_clip_low: 3.0 is above the upper bound 2.0"),
        ("tis_lower_bound=2.5", "algorithm.tis_lower_bound: 2.5 is above"),
        ("overlong_buffer_len=2048", "is more than rollout_max_response_len 1024"),
        ("keep_old_actor=true", "with update_weights_interval = 1"),
        ("reduction_leaves=6", "a power of two"),
        ("reduction_leaves=8 megatron.overlap_grad_reduce=true", "must be false"),
        (
            "reduction_leaves=8 megatron.expert_model_parallel_size=2",
            "train.reduction_leaves: is not supported with expert",
        ),
        ("update_weights_interval=3 save_interval=4", "checkpoint.save_interval: 4 is not a multiple"),
        ("update_weights_interval=3 eval_interval=4", "eval.eval_interval: 4 is not a multiple"),
        ("advantage_estimator=ppo num_critic_only_steps=100", "leave no step of the 100"),
        ("critic_lr=1e-6 min_lr=1e-5 lr_decay_style=linear", "is larger than train.critic_lr"),
        ("opd_kl_coef=0.1", "needs a teacher"),
        ("rollout_temperature=0.0", "all samples of a group are equal"),
        ("rollout_top_k=1", "rollout_top_k: at 1 all samples of a group are equal"),
        ("rollout_top_k=0", "must be -1"),
        ("eval_interval=1", "eval.eval_prompt_data: is empty"),
        ("max_tokens_per_gpu=256", "cannot hold the longest sequence (1025 tokens"),
        ("rollout_max_response_len=4096", "exceed the model's context of 2048"),
        ("rollout_max_prompt_len=1025", "1025 prompt + 1024 response tokens exceed"),
        ("num_rollout=10 lr_warmup_iters=10", "must be smaller than the run's 10 optimizer steps"),
        ("min_lr=0.1 lr_decay_style=cosine", "is larger than megatron.lr"),
        ("megatron.tensor_model_parallel_size=4", "do not divide the 2 that train"),
        ("rollout_num_gpus=2", "2 of 2 ranks leave none to train"),
        (
            "heartbeat_timeout=1.5",
            "deadlines.heartbeat_timeout: must be at least 2, got 1.5: ranks send a heartbeat",
        ),
        ("cells=2 reduction_leaves=4 cell_timeout=1", "resilience.cell_timeout: must be at least 2, got 1: ranks send"),
        ("cells=2 rollout_num_gpus=2", "train.reduction_leaves: cells need it"),
        ("cells=2 reduction_leaves=2", "train.reduction_leaves: 2 is not a multiple of 4"),
        ("cells=2 reduction_leaves=4 rollout_num_gpus=1", "rollout.rollout_num_gpus: must be 0 with resilience.cells"),
        ("cells=2 update_weights_interval=2", "refit.update_weights_interval: must be 1 with resilience.cells"),
        ("rollout_num_gpus=1 megatron.tensor_model_parallel_size=2", "do not divide the 1 that train"),
        ("rollout_num_gpus=1 sglang.tp_size=2", "engines of 2 ranks do not divide the 1 that generate"),
        ("rollout_num_gpus=1 offload_train=true", "no engine needs the trainers' memory"),
        ("rollout_num_gpus=1 offload_rollout=all", "rollout.offload_rollout: must be 'nothing' or 'auto'"),
        ("rollout_num_gpus=1 mode=dpo", "this run of mode 'dpo' generates nothing"),
        ("rollout_num_gpus=1 mode=sft", "this run of mode 'sft' generates nothing"),
        ("megatron.virtual_pipeline_model_parallel_size=2", "needs pipeline_model_parallel_size > 1"),
        ("megatron.sequence_parallel=true", "needs tensor_model_parallel_size > 1"),
        ("megatron.recompute_granularity=full", "needs recompute_method and recompute_num_layers"),
        ("megatron.recompute_method=uniform", "needs recompute_granularity = 'full'"),
        ("megatron.overlap_param_gather=true", "needs use_distributed_optimizer"),
        ("megatron.expert_model_parallel_size=2", "the model has no experts"),
        ("megatron.transformer_impl=inference_optimized", "cannot train"),
        (f"{TE} dtype=float32", "needs model.dtype = 'bfloat16'"),
        (f"{TE} reduction_leaves=2", "needs megatron.transformer_impl = 'local'"),
        (f"{TE} megatron.tp_comm_overlap=true", "sets up no communication buffers"),
        (f"{TE} megatron.fp4=e2m1", "megatron.fp4: is not supported"),
        (TE, "the package transformer_engine is not installed"),
        ("megatron.fp8=hybrid", "megatron.fp8: needs megatron.transformer_impl = 'transformer_engine'"),
        (f"{TE} megatron.fp8=hybrid megatron.fp8_recipe=delayed", "log-probs depend on what was computed before"),
        (f"{TE} megatron.fp8=hybrid megatron.fp8_recipe=mxfp8", "'mxfp8' is not supported"),
        (f"{TE} megatron.fp8=hybrid megatron.fp8_param=true", "megatron.fp8_param: must be false"),
        (f"{TE} megatron.fp8=hybrid megatron.fp8_dot_product_attention=true", "must be false; attention"),
        (f"{TE} megatron.fp8=hybrid", "128 must divide the model's"),
        ("rollout_stop_token_ids=[7,4096]", "rollout.rollout_stop_token_ids: 4096 must be below 128"),
        ("megatron.optimizer=lion", "megatron.optimizer: must be 'adam' or 'sgd', got 'lion'"),
        ("over_sampling_batch_size=2", "2 prompts are fewer than the rollout_batch_size ="),
        ("partial_rollout=true", "rollout.partial_rollout: needs rollout.over_sampling_batch_size above"),
        ("acceptance=first_finished over_sampling_batch_size=99 deterministic=true", "may not depend on time"),
        ("acceptance=balanced over_sampling_batch_size=99 partial_rollout=true", "choose one of the two"),
        ("mask_offpolicy_in_partial_rollout=true", "needs rollout.partial_rollout"),
        ("acceptance=a:b", "rollout.acceptance: needs rollout.over_sampling_batch_size above"),
        ("acceptance=a:b over_sampling_batch_size=99 partial_rollout=true", "a function of rollout.acceptance waits"),
        ("acceptance=last", "must be submission_order, first_finished, balanced or `module:function`, got 'last'"),
        ("packing=a:b reduction_leaves=8", "train.packing: must be 'balanced' with reduction_leaves"),
        ("on_environment_failure=mask n_samples_per_prompt=1", "'mask' leaves nothing of a group of one sample"),
        ("environment.environment=nothing", "must be single_turn, tools or `module:function`, got 'nothing'"),
        ("engine=torch", "rollout.engine: must be sglang or `module:function`, such as tests.reference_engine"),
        (
            "rm_type=nothing",
            "reward.rm_type: must be math, exact, f1, gpqa, code, remote, judge or `module:function`, got 'nothing'",
        ),
        ("rm_type=remote", "reward.remote_url: is required by the reward 'remote'"),
        (
            "rm_type=judge judge_url=http://x/v1 judge_prompt={response}",
            "reward.judge_model: is required by the reward",
        ),
        ("rm_type=judge judge_prompt={response}", "reward.judge_url: is required by the reward 'judge', or judge_hf"),
        ("judge_prompt=Score", "reward.judge_prompt: has no {response}"),
        (JUDGED, "reward.judge_num_gpus: must be at least 1: the judge of judge_hf_checkpoint has ranks of its own"),
        ("judge_num_gpus=1", "reward.judge_hf_checkpoint: is required by judge_num_gpus"),
        (f"{JUDGE} judge_url=http://x/v1", "reward.judge_url: is another judge than that of judge_hf_checkpoint"),
        (f"{JUDGED} judge_num_gpus=2", "reward.judge_num_gpus: 2 of 2 ranks leave none to train"),
        (f"{JUDGE} rollout_num_gpus=1", "reward.judge_num_gpus: 1 and rollout_num_gpus = 1 of 2 ranks leave none to"),
        (f"{JUDGE} rollout_num_gpus=3", "rollout.rollout_num_gpus: 3 of 2 ranks leave none to train"),
        (f"{JUDGE} megatron.tensor_model_parallel_size=2", "do not divide the 1 that train"),
        (f"{JUDGE} sglang.tp_size=2", "engines of 2 ranks do not divide the 1 that generate"),
        (f"{JUDGE} cells=2 reduction_leaves=4", "reward.judge_num_gpus: must be 0 with resilience.cells > 1"),
        (f"{JUDGE} mode=dpo", "reward.judge_num_gpus: must be 0, because this run of mode 'dpo' generates nothing"),
        (f"{JUDGE} judge_sglang={{tp_size=2}}", "engines of tp_size = 2 ranks do not divide the judge_num_gpus = 1"),
        (f"{JUDGE} judge_sglang={{tp_sise=2}}", "reward.judge_sglang: tp_sise: unknown key; did you mean tp_size?"),
        (f"{JUDGE} judge_sglang={{pp_size=2}}", "reward.judge_sglang: pp_size: cannot be set here: an engine is one"),
        (f"{JUDGE} judge_sglang={{tp_size=0}}", "reward.judge_sglang: tp_size: must be at least 1"),
        (f"{JUDGE} judge_sglang={{tp_size='2'}}", "reward.judge_sglang: tp_size: expected int, got str '2'"),
        (
            f"{JUDGE} judge_arguments={{n=2}}",
            "reward.judge_arguments: n: engines of this run do not have it",
        ),
        (f"{JUDGE} judge_arguments={{max_tokens=0}}", "reward.judge_arguments: max_tokens: Input should be greater"),
        (
            f"{JUDGE} judge_arguments={{top_k=0}}",
            "reward.judge_arguments: top_k: must be -1 (the whole vocab",
        ),
        (f"{JUDGE} judge_arguments={{temperature=1e-9}}", "reward.judge_arguments: temperature: must be 0 or at least"),
        (
            "second_roles=['b']",
            "second_policy.second_num_gpus: must be at least 1: a second policy has ranks of its own",
        ),
        ("second_num_gpus=1", "second_policy.second_roles: is required by second_num_gpus"),
        ("second_num_gpus=1 second_roles=['b']", "requires run.mode = 'rl' and an environment with several roles"),
        (f"{SECOND} cells=2 reduction_leaves=4", "second_policy.second_num_gpus: must be 0 with resilience.cells > 1"),
        (
            f"{SECOND} second_num_gpus=2",
            "second_policy.second_num_gpus: 2 and the ranks of engines and judge leave none",
        ),
        (f"{SECOND} rollout_num_gpus=1", "second_policy.second_num_gpus: 1 and the ranks of engines and judge leave"),
        (f"{SECOND} sglang.tp_size=2", "second_policy.second_num_gpus: engines of 2 ranks, as the first policy has"),
        (f"{SECOND} megatron.tensor_model_parallel_size=2", "do not divide the 1 that train"),
        ("remote_url=x/score", "reward.remote_url: must be a URL that begins with http:// or https://"),
        ("remote_url=http://me:word@x/score", "reward.remote_url: must be a URL"),
        (
            "rm_type=remote remote_url=http://x remote_key_variable=A_KEY",
            "reward.remote_key_variable: add A_KEY to reward.reward_environment",
        ),
        ("engine=vllm", "rollout.engine: must be sglang or `module:function`, got 'vllm'"),
        ("sglang.tp_size=4", "engines of 4 ranks do not divide the 2 that generate"),
        (f"{EXACT} engine={OTHER_ENGINE}", "rollout.engine: parity needs 'sglang'"),
        (f"{EXACT} sglang.attention_backend=flashinfer", "sglang.attention_backend: parity needs 'fa3'"),
        (f"{EXACT} sglang.decode_attention_backend=triton", "sglang.decode_attention_backend: parity needs that of"),
        (f"{EXACT} sglang.model_impl=transformers", "sglang.model_impl: parity needs 'auto'"),
        (f"{EXACT} sglang.enable_fused_qk_norm_rope=true", "sglang.enable_fused_qk_norm_rope: parity cannot hold"),
        (f"{EXACT} sglang.kv_cache_dtype=fp8_e4m3", "'fp8_e4m3' rounds keys and values"),
        (f"{EXACT} sglang.enable_fp32_lm_head=true", "sglang.enable_fp32_lm_head: parity cannot hold"),
        (f"{EXACT} {TE}", "megatron.transformer_impl: parity needs 'local'"),
        (f"{EXACT} megatron.bias_activation_fusion=true", "megatron.bias_activation_fusion: must be false"),
        (f"{EXACT} sglang.tp_size=3", "sglang.tp_size: parity holds for 1, 2, 4, not 3"),
        (f"{EXACT} megatron.context_parallel_size=2", "megatron.context_parallel_size: must be 1"),
        (f"{EXACT} rollout_top_p=0.9", "rollout.rollout_top_p: parity needs the whole vocabulary"),
        (f"{EXACT} rollout_top_k=50", "rollout.rollout_top_k: parity needs the whole vocabulary"),
        (f"{EXACT} mismatch_budget={{max=0.1}}", "nothing may differ; leave it out"),
        (f"{EXACT} mode=sft", "run.mode: parity compares the log-probs of generated tokens"),
        ("parity_gate=mask mismatch_budget={mean=0.1}", "needs `max`, beyond which"),
        ("use_wandb=true", "the package wandb is not installed"),
    ],
)
def test_a_conflict_is_named(recipe: Path, overrides: str, message: str) -> None:  # noqa: F811
    found = errors(recipe, *overrides.split(), world_size=2)
    assert any(message in error for error in found), found
    load_config(recipe, world_size=2)


@pytest.mark.parametrize(
    "overrides",
    [
        "n_samples_per_prompt=1",
        "rollout_temperature=0.0",
        "num_rollout=10 lr_warmup_iters=10",
        "keep_old_actor=true",
        f"max_tokens_per_gpu=256 prompt_data={NO_ROWS}",
    ],
)
def test_what_only_training_requires(recipe: Path, overrides: str) -> None:  # noqa: F811
    """Responses may be greedy, or one for each prompt, where nobody learns from them."""
    load_config(recipe, overrides.split(), check_files=False, trains=False)


def test_every_error_of_a_judge_is_named_at_once(recipe: Path) -> None:  # noqa: F811
    wrong = ["judge_url=http://x/v1", "judge_sglang={tp_size=2}", "judge_arguments={n=2}"]
    found = errors(recipe, *JUDGE.split(), *wrong, world_size=2)
    assert [message.split(":")[0] for message in found] == [
        "reward.judge_url",
        "reward.judge_sglang",
        "reward.judge_arguments",
        "reward.judge_hf_checkpoint",
    ]


def test_a_judge_that_nobody_asks_is_a_warning(recipe: Path) -> None:  # noqa: F811
    def warnings(*overrides: str) -> str:
        judge = f"judge_hf_checkpoint={recipe.parent / 'checkpoint'}"
        config = load_config(recipe, [judge, "judge_num_gpus=1", *overrides], world_size=2)
        return "\n".join(checks.warnings(config))

    assert "reward.judge_num_gpus: these ranks stay idle, because no reward is 'judge'" in warnings()
    assert "these ranks stay idle, because this run generates nothing" in warnings("mode=sft")
    assert not warnings("rm_type=judge", "judge_prompt={response}")


def test_the_heads_of_a_judge_are_divided(recipe: Path) -> None:  # noqa: F811
    folder = f"judge_hf_checkpoint={recipe.parent / 'checkpoint'}"
    found = errors(recipe, *JUDGE.split(), folder, "judge_num_gpus=3", "judge_sglang={tp_size=3}", world_size=4)
    assert "reward.judge_sglang: tp_size: 3 does not divide the model's 4 attention heads" in found
    assert len(found) == 2


def test_layouts_against_the_model(recipe: Path) -> None:  # noqa: F811
    def found(size: str, value: int) -> str:
        return "\n".join(errors(recipe, f"megatron.{size}_model_parallel_size={value}", world_size=12))

    assert "does not divide the model's 4 attention heads" in found("tensor", 3)
    assert "not a multiple or divisor of the model's 2 key-value heads" in found("tensor", 3)
    assert "do not divide the model's 4 layers" in found("pipeline", 3)
    assert "sglang.tp_size: 3 does not divide the model's 4 attention heads" in "\n".join(
        errors(recipe, "sglang.tp_size=3", world_size=12)
    )
    load_config(recipe, ["megatron.tensor_model_parallel_size=4", "sglang.tp_size=4"], world_size=12)


def test_experts_against_the_model(recipe: Path) -> None:  # noqa: F811
    config = recipe.parent / "checkpoint" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_experts": 6, "moe_intermediate_size": 90}))
    sizes = ["megatron.expert_model_parallel_size=4", "megatron.tensor_model_parallel_size=4"]
    found = "\n".join(errors(recipe, *sizes, "megatron.sequence_parallel=true", world_size=16))
    assert "megatron.expert_model_parallel_size: 4 does not divide 6 experts" in found
    assert "expert_tensor_parallel_size: 4 does not divide the experts' width 90" in found


def test_canonical_reduction_over_the_ranks(recipe: Path) -> None:  # noqa: F811
    load_config(recipe, ["reduction_leaves=4"], world_size=4)
    assert "4 is not a multiple of the data-parallel size 8" in str(errors(recipe, "reduction_leaves=4", world_size=8))


def test_models_that_do_not_fit_each_other(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    shape = json.loads((recipe.parent / "checkpoint" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": 7, "hidden_size": 9}))
    (tmp_path / "model.safetensors").touch()
    for name, more in (("teacher_load", ["opd_kl_coef=1"]), ("critic_load", []), ("ref_load", ["kl_coef=0.1"])):
        found = errors(recipe, f"{name}={tmp_path}", *more)
        assert any(f.startswith(f"model.{name}: {tmp_path} has vocab_size 7") for f in found)
        assert len(found) == (2 if name == "ref_load" else 1)


def test_an_estimator_without_groups_takes_single_responses(recipe: Path) -> None:  # noqa: F811
    load_config(recipe, ["advantage_estimator=reinforce_plus_plus", "n_samples_per_prompt=1"])


def test_supervised_runs_ask_for_no_groups(recipe: Path) -> None:  # noqa: F811
    load_config(recipe, ["mode=sft", "n_samples_per_prompt=1", "global_batch_size=5", "max_tokens_per_gpu=64"])


def test_warnings_do_not_stop_a_run(recipe: Path) -> None:  # noqa: F811
    assert checks.warnings(load_config(recipe)) == []
    checkpoint = recipe.parent / "checkpoint"
    found = checks.warnings(load_config(recipe, ["rollout_top_p=0.9", f"ref_load={checkpoint}"]))
    assert [message.split(":")[0] for message in found] == ["model.ref_load"]


def test_every_rule_reads_settings_that_exist(recipe: Path) -> None:  # noqa: F811
    """A misspelt name would silently switch a rule off."""
    of_machine = {"shape", "world_size", "trainer_ranks", "engine_ranks", "capabilities"}
    known = {*checks.settings(load_config(recipe)), *of_machine}
    everything = [*checks.ERRORS, *checks.PARITY, *checks.NOT_BY_DEFAULT, *checks.WARNINGS, *checks.FILES]
    assert len(everything) > 15
    read = [set(_names_read(ast.parse(inspect.getsource(rule)), rule.__globals__)) for rule in everything]
    assert all(read)
    assert set.union(*read) <= known


def _names_read(rule: ast.AST, constants: dict[str, Any]) -> Iterator[str]:
    """Of the settings `s`: `s.name`, and `s[name]` in a loop over names or over tuples with names in them."""
    for node in ast.walk(rule):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "s":
            yield node.attr
        elif isinstance(node, ast.For):
            keys = {
                key.slice.id
                for statement in node.body
                for key in ast.walk(statement)
                if isinstance(key, ast.Subscript) and ast.unparse(key.value) == "s" and isinstance(key.slice, ast.Name)
            }
            targets = [t.id if isinstance(t, ast.Name) else "" for t in getattr(node.target, "elts", [node.target])]
            if isinstance(node.iter, ast.Name) and keys:
                yield from constants[node.iter.id]
            for entry in getattr(node.iter, "elts", []):
                parts = getattr(entry, "elts", [entry])
                yield from (part.value for name, part in zip(targets, parts, strict=True) if name in keys)


def test_names_read_in_loops_are_found() -> None:
    found = _names_read(
        ast.parse(
            "for a, b in (('x', 1), ('y', 2)):\n  s[a] == b\nfor c in ('z',):\n  s[c]\nfor c in NAMES:\n  s[c]\ns.w"
        ),
        {"NAMES": ("v",)},
    )
    assert set(found) == {"x", "y", "z", "w", "v"}


LAYOUTS: list[dict[str, object]] = [
    {},
    {"tensor_model_parallel_size": 2},
    {"tensor_model_parallel_size": 4},
    {"tensor_model_parallel_size": 3},
    {"sequence_parallel": True},
    {"sequence_parallel": True, "tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 3},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
    {"expert_model_parallel_size": 2},
    {"recompute_granularity": "full"},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
]


def _megatron_refuses(layouts: list[dict[str, object]]) -> list[str]:
    """Megatron's messages, "" for a layout that it accepts."""
    import torch
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    def message(layout: dict[str, object]) -> str:
        try:
            config = TransformerConfig(
                num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2,
                pipeline_dtype=torch.float32, **layout,
            )  # fmt: skip
            get_num_layers_to_build(config, vp_stage=0, pp_rank=0)
        except (ValueError, AssertionError) as error:
            return str(error) or type(error).__name__
        return ""

    return [message(layout) for layout in layouts]


def _real_fields() -> dict[str, set[str]]:
    import dataclasses

    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig
    from sglang.srt.server_args import ServerArgs

    def names(*classes: type) -> set[str]:
        return {field.name for cls in classes for field in dataclasses.fields(cls)}

    launcher = {"num_layers_per_virtual_pipeline_stage"}
    return {
        "megatron": launcher | names(TransformerConfig, OptimizerConfig, DistributedDataParallelConfig),
        "sglang": names(ServerArgs),
    }


def test_megatron_agrees(recipe: Path, ranks: Ranks) -> None:  # noqa: F811
    (refused,) = ranks.run(1, _megatron_refuses, LAYOUTS)
    ours = [
        checks.errors(load_config(recipe).model_copy(update={"megatron": {"lr": 1e-4, **layout}})) for layout in LAYOUTS
    ]
    assert [bool(own) for own in ours] == [bool(message) for message in refused]
    assert any(ours)
    assert not all(ours)


def test_fields_read_from_source_are_those_of_the_classes(ranks: Ranks) -> None:
    (real,) = ranks.run(1, _real_fields)
    assert {table: set(checks.backend_fields(table)) for table in real} == real


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "overlaps with"),
        ("checkpoint", "overlaps with model.hf_checkpoint"),
        ("checkpoint/inside", "overlaps with model.hf_checkpoint"),
        ("link", "overlaps with model.hf_checkpoint"),
        ("checkpoint/../checkpoint", "overlaps with model.hf_checkpoint"),
        ("data", "overlaps with data.prompt_data"),
        ("evaluation", "overlaps with eval.eval_prompt_data.sums"),
        ("runs", "overlaps with the run's folder"),
        ("runs/run", "overlaps with the run's folder"),
        ("runs/run/checkpoints/step_000001", "overlaps with the run's checkpoints"),
        ("earlier/step_000002/trainer", "overlaps with checkpoint.load"),
        ("data/prompts.jsonl", "overlaps with data.prompt_data"),
        ("file", "is a file; name a folder"),
        ("file/inside", "is a file; name a folder"),
        ("dangling", None),
        ("data/export", None),
        ("runs/run/export", None),
        ("runs/run/other", None),
        ("new/folder", None),
    ],
)
def test_an_export_has_a_folder_of_its_own(recipe: Path, place: str, message: str | None) -> None:  # noqa: F811
    folder = recipe.parent
    for name in ("data", "evaluation", "earlier/step_000002"):
        (folder / name).mkdir(parents=True)
    for name in ("data/prompts.jsonl", "evaluation/sums.jsonl", "file"):
        (folder / name).touch()
    (folder / "link").symlink_to("checkpoint")
    (folder / "dangling").symlink_to("not yet there")
    overrides = [
        f"prompt_data={folder}/data/prompts.jsonl",
        f"eval_prompt_data.sums={folder}/evaluation/sums.jsonl",
        f"output_dir={folder}/runs",
        f"checkpoint.load={folder}/earlier/step_000002",
        f"export_dir={folder}/{place}",
    ]
    found: list[str] = []
    try:
        load_config(recipe, overrides)
    except ConfigError as error:
        found = error.errors
    assert len(found) == (message is not None), found
    assert message is None or (found[0].startswith("checkpoint.export_dir: ") and message in found[0])
    load_config(recipe, [*overrides, "export_final=false"])
