"""What `plan` says, against Megatron's own groups and the parameters that a real trainer and engine hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from miles_spmd.config import Config
from miles_spmd.config.load import load_config
from miles_spmd.models import load_family
from miles_spmd.models.random import SHAPES
from miles_spmd.planning.memory_estimate import MemoryEstimate, checkpoint_bytes, estimate_judge, estimate_memory
from miles_spmd.planning.parallel_layout import Groups, ParallelLayout
from miles_spmd.planning.plan import _count, describe_plan
from tests.models.tiny import checkpoint
from tests.ranks import Ranks
from tests.training.cases import sequences

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"


def make_config(path: Path, megatron: dict[str, Any], **tables: dict[str, Any]) -> Config:
    base = {
        "model": {"hf_checkpoint": path, "dtype": "float32"},
        "data": {"prompt_data": "data.jsonl", "rollout_max_prompt_len": 100},
        "rollout": {"rollout_max_response_len": 156, "rollout_batch_size": 4, "n_samples_per_prompt": 8},
        "train": {"max_tokens_per_gpu": 512},
        "megatron": {"lr": 1e-3, **megatron},
    }
    return Config.model_validate(base | tables)


def _megatron_groups(megatron: dict[str, int]) -> dict[str, list[int]]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**megatron)
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "etp": parallel_state.get_expert_tensor_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "edp": parallel_state.get_expert_data_parallel_group(),
    }
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


@pytest.mark.parametrize(
    "megatron",
    [
        {},
        {TP: 2},
        {PP: 2},
        {CP: 2, TP: 2},
        {PP: 2, TP: 2},
        {EP: 2, ETP: 1},
        {EP: 2, ETP: 1, TP: 2},
        {EP: 2, ETP: 1, PP: 2},
    ],
    ids=str,
)
def test_groups_are_megatrons(megatron: dict[str, int], ranks: Ranks) -> None:
    layout = ParallelLayout.of(make_config(Path("absent"), megatron), world_size=4)
    real = ranks.run(4, _megatron_groups, megatron)
    for axis in real[0]:
        expected: Groups = sorted({tuple(groups[axis]): groups[axis] for groups in real}.values())
        assert sorted(layout.groups(axis)) == expected, axis


def _trainer_bytes(config: Config) -> dict[str, int]:
    """Counted on the tensors of a trainer: parameters, gradient buffers, everything in the optimizer's state."""
    from miles_spmd.algorithms.losses import make_loss
    from miles_spmd.training.trainer import Trainer

    trainer = Trainer(config, load_family(config.model.hf_checkpoint), make_loss("sft", config.algorithm))
    buffers = [b for chunk in trainer._chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    states = [
        (inner.optimizer.state[parameter], parameter)
        for inner in trainer._optimizer.chained_optimizers
        if not inner.is_stub_optimizer
        for parameter in inner.optimizer.state
    ]
    moments = sum(value.nbytes for state, _ in states for name, value in state.items() if name.startswith("exp_avg"))
    main = sum(p.nbytes for _, p in states if config.model.dtype != "float32")
    return {
        "parameters": sum(weight.nbytes for weight in trainer.weights().values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": moments + main,
    }


@pytest.mark.parametrize(
    ("model", "megatron", "dtype"),
    [
        ("qwen3", {TP: 2}, "float32"),
        ("qwen3-tied", {PP: 2}, "float32"),
        ("qwen2", {"use_distributed_optimizer": True}, "bfloat16"),
        ("llama", {PP: 2, "use_distributed_optimizer": True}, "float32"),
        ("qwen3_moe", {EP: 2, ETP: 1}, "bfloat16"),
    ],
)
def test_bytes_are_those_of_a_trainer(model: str, megatron: dict[str, Any], dtype: str, ranks: Ranks) -> None:
    path = checkpoint(model)
    config = make_config(path, megatron, model={"hf_checkpoint": path, "dtype": dtype})
    estimate = estimate_memory(config, load_family(path), ParallelLayout.of(config, world_size=2))
    real = ranks.run(2, _trainer_bytes, config)
    for name in ("parameters", "gradients", "optimizer"):
        fullest = max(rank[name] for rank in real)
        assert getattr(estimate, name) == pytest.approx(fullest, rel=0.04), name  # Megatron pads its buffers


def _summed_bytes(config: Config) -> dict[str, int]:
    """The most bytes that a trainer has for gradients of its leaves, and for those of other ranks, in an update."""
    import torch
    import torch.distributed as dist

    from miles_spmd.algorithms.losses import make_loss
    from miles_spmd.training.cells.trainer import CellTrainer
    from miles_spmd.training.reduction import TreeSum
    from miles_spmd.training.trainer import Trainer

    arguments = config, load_family(config.model.hf_checkpoint), make_loss("sft", config.algorithm)
    cells = config.resilience.cells
    trainer = CellTrainer(*arguments, parts=cells) if cells > 1 else Trainer(*arguments)
    total = trainer._sum_gradients
    assert isinstance(total, TreeSum)
    add, receive, found = TreeSum.__call__, dist.recv, {"sums": 0, "received": 0}

    def added(self: Any, *arguments: Any, **named: Any) -> None:
        add(self, *arguments, **named)
        found["sums"] = max(found["sums"], sum(part.nbytes for parts in self._subtrees for part in parts))

    def received(part: torch.Tensor, *arguments: Any, **named: Any) -> None:
        found["received"] += part.nbytes
        receive(part, *arguments, **named)

    batch = [[sequence] for sequence in sequences([5] * total.own_leaves)]
    with patch.object(TreeSum, "__call__", added), patch.object(dist, "recv", received):
        trainer.compute_part(0, 0, batch) if isinstance(trainer, CellTrainer) else trainer.train_step(batch)
    return found


@pytest.mark.parametrize(
    ("leaves", "cells", "megatron"),
    [(1, 1, {TP: 2}), (8, 1, {TP: 2}), (2, 1, {}), (16, 1, {}), (16, 2, {"use_distributed_optimizer": True})],
)
def test_sums_of_leaves_are_those_of_a_trainer(leaves: int, cells: int, megatron: dict[str, Any], ranks: Ranks) -> None:
    path = checkpoint("qwen3")
    tables = {"train": {"reduction_leaves": leaves}, "resilience": {"cells": cells}}
    config = make_config(path, megatron, model={"hf_checkpoint": path, "dtype": "bfloat16"}, **tables)
    estimate = estimate_memory(config, load_family(path), ParallelLayout.of(config, world_size=2))
    real = ranks.run(2, _summed_bytes, config)
    for name in ("sums", "received"):
        assert getattr(estimate, name) == pytest.approx(max(rank[name] for rank in real), rel=0.04), name
    assert estimate.sums or leaves <= 2
    without = config.model_copy(update={"train": config.train.model_copy(update={"reduction_leaves": 0})})
    plain = estimate_memory(without, load_family(path), ParallelLayout.of(config, world_size=2))
    assert estimate.training - plain.training == estimate.sums


@pytest.mark.parametrize(
    ("name", "changes", "tokens", "peak"),
    [
        ("qwen3-0.6b", {}, 4096, 7.03),
        ("qwen3-0.6b", {}, 16384, 23.92),
        ("qwen3-4b", {}, 4096, 18.46),
        ("qwen3-30b-a3b", {"num_hidden_layers": 4}, 4096, 3.51),
    ],
)
def test_a_step_that_was_measured(name: str, changes: dict[str, int], tokens: int, peak: float) -> None:
    """GiB that torch had at most in forward and backward pass on one H200, in bf16, beyond what it had before."""
    config = make_config(Path("absent"), {}, model={"hf_checkpoint": "absent"}, train={"max_tokens_per_gpu": tokens})
    family = load_family(SHAPES[name] | changes)
    m = estimate_memory(config, family, ParallelLayout.of(config, world_size=1))
    assert m.working / 2**30 == pytest.approx(peak, rel=0.03)


def test_a_chunk_of_logits_is_the_trainers() -> None:
    from miles_spmd.planning import memory_estimate
    from miles_spmd.training import output_layer

    assert memory_estimate.MAX_LOGITS == output_layer.MAX_LOGITS


def test_models_beside_the_policy_are_counted() -> None:
    path = checkpoint("qwen3")

    def memory_estimate(interval: int = 1, **algorithm: Any) -> MemoryEstimate:
        teacher = {"teacher_load": checkpoint("qwen2")} if "opd_kl_coef" in algorithm else {}
        model = {"hf_checkpoint": path, "dtype": "bfloat16", **teacher}
        lag = {"update_weights_interval": interval}
        config = make_config(path, {}, model=model, algorithm=algorithm, refit=lag)
        return estimate_memory(config, load_family(path), ParallelLayout.of(config, world_size=1))

    alone = memory_estimate()
    assert (alone.critic, alone.host) == (0, 0)
    assert memory_estimate(kl_loss_coef=0.1, keep_old_actor=True).host == 2 * alone.parameters
    assert memory_estimate(interval=2).training == alone.training + alone.engine_weights
    teacher = load_family(checkpoint("qwen2")).num_parameters() * 2
    assert memory_estimate(opd_kl_coef=1.0).host == memory_estimate(opd_kl_coef=1.0).others == teacher
    head = load_family(path).vocab_size - 1  # rows that a value head has not
    policy = alone.parameters + alone.gradients + alone.optimizer
    assert memory_estimate(advantage_estimator="ppo").critic == policy - head * load_family(path).hidden_size * (
        2 + 4 + 12
    )


def test_recompute_and_sequence_parallel_save_activations() -> None:
    path = checkpoint("qwen3")

    def activations(**megatron: Any) -> int:
        config = make_config(path, megatron)
        return estimate_memory(config, load_family(path), ParallelLayout.of(config, world_size=2)).activations

    full = {"recompute_granularity": "full", "recompute_num_layers": 1}
    assert activations(**full, recompute_method="uniform") < activations() / 2
    assert activations(**full, recompute_method="block") < activations()
    assert activations(**{TP: 2, "sequence_parallel": True}) * 2 == activations()


def test_text() -> None:
    path = checkpoint("qwen3")
    config = make_config(
        path,
        {TP: 2, "sequence_parallel": True},
        sglang={"tp_size": 2},
        run={"name": "trial", "num_rollout": 10},
        train={"max_tokens_per_gpu": 512, "global_batch_size": 16},
        eval={"eval_interval": 5, "eval_prompt_data": {"sums": "sums.jsonl"}},
    )
    text = describe_plan(config, world_size=4, device_gib=5)
    for line in (
        "trial: reinforcement learning of a qwen3 model",
        "tensor        2 of 2:  [0 1] [2 3]",
        "data          2 of 2:  [0 2] [1 3]",
        "engines       2 of 2:  [0 1] [2 3]",
        "rollout       4 prompts x 8 samples = 32 samples",
        "16 for each of 2 engines",
        "train         2 optimizer steps of 16 samples in each rollout",
        "8 for each of 2 replicas of the trainer",
        "micro-batches of at most 512 tokens: 4 if every sequence has the 256 tokens that it may have",
        "evaluation    every 5 and at both ends, 1 sample a prompt",
        "in total      10 rollouts, 20 optimizer steps, 320 samples",
        "KV cache: 1,296 tokens, all that its requests can fill",  # 16 of the context's 64 and a page
        "while the trainer works the engine releases: weights, KV cache and CUDA graphs",
        "at most, with 3 for CUDA and NCCL: 3.003 while training, 3.001 while generating",
    ):
        assert line in text, text
    of_cells = config.model_copy(update={"resilience": config.resilience.model_copy(update={"cells": 2})})
    text = describe_plan(of_cells, world_size=4)
    for line in ("Ranks (4 in each of 2 cells)", "8 for each of 4 engines", "4 for each of 4 replicas of the trainer"):
        assert line in text, text
    assert "the engine releases: nothing" in describe_plan(config, 4, device_gib=6)
    text = describe_plan(config, 4, device_gib=2.5)
    assert (
        "does not fit: no room for a KV cache in the 2.5 GiB of a device. What helps: set train.offload_train" in text
    )
    assert "does not fit: training needs more than the 2.5 GiB of a device. What helps: lower train.max_tokens" in text


@pytest.mark.parametrize(("ranks", "offloads", "nbytes"), [(1, False, 12), (2, False, 6), (1, True, 0)])
def test_a_save_takes_host_memory(ranks: int, offloads: bool, nbytes: int) -> None:
    """For fp32 weights and two moments, which data-parallel ranks share; what has moved out is there already."""
    family = load_family(SHAPES["qwen3-4b"])

    def estimate(**checkpoint: int) -> MemoryEstimate:
        tables = {"train": {"offload_train": offloads}, "model": {"hf_checkpoint": "absent", "dtype": "bfloat16"}}
        config = make_config(Path("absent"), {}, checkpoint=checkpoint, **tables)
        return estimate_memory(config, family, ParallelLayout.of(config, world_size=ranks))

    assert estimate(save_interval=5).host - estimate().host == nbytes * family.num_parameters()


def test_gradients_that_cells_exchange_take_host_memory() -> None:
    """Their own where they compute one that a lost cell has left, in fp32; torch rounds pinned memory up to a power of
    two."""
    family = load_family(SHAPES["qwen3-4b"])

    def host(cells: int) -> int:
        config = make_config(Path("absent"), {}, resilience={"cells": cells}, train={"reduction_leaves": 8})
        return estimate_memory(config, family, ParallelLayout.of(config, world_size=1)).host

    assert host(2) - host(1) == host(8) - host(1) == 16 * 2**30 >= 4 * family.num_parameters()


def test_a_trainer_that_moves_out_leaves_room() -> None:
    shape = SHAPES["qwen3-4b"]

    def estimate(**train: bool) -> MemoryEstimate:
        config = make_config(Path("absent"), {}, train=train)
        return estimate_memory(config, load_family(shape), ParallelLayout.of(config, world_size=1))

    stays, moves = estimate(), estimate(offload_train=True)
    parameters = load_family(shape).num_parameters()
    assert stays.generating - moves.generating == moves.moves_out == (4 + 8) * parameters  # fp32: two moments
    assert moves.training == stays.training
    assert moves.host - stays.host == 32 * 2**30 >= 8 * parameters  # gradients go nowhere
    gained = moves.kv_tokens(139 << 30, 0.8) - stays.kv_tokens(139 << 30, 0.8)
    assert gained == pytest.approx(0.8 * moves.moves_out / moves.kv_bytes_per_token, abs=2)


def test_trainers_and_engines_apart() -> None:
    config = make_config(checkpoint("qwen3"), {TP: 2}, rollout={"rollout_num_gpus": 4}, sglang={"tp_size": 2})
    layout = ParallelLayout.of(config, world_size=8)
    assert (layout.dp, layout.engines) == (2, 2)
    assert layout.groups("tp") == [[0, 1], [2, 3]]
    assert layout.engine_groups() == [[4, 5], [6, 7]]
    text = describe_plan(config, world_size=8, device_gib=6)
    for line in (
        "     3       1       0       1       0       -",
        "     6       -       -       -       -       1*",
        "disaggregated: 4 train, 4 generate",
        "128 for each of 2 engines",
        "128 for each of 2 replicas of the trainer",
    ):
        assert line in text, text


def test_judges_have_ranks_of_their_own() -> None:
    reward = {"judge_hf_checkpoint": checkpoint("qwen3"), "judge_num_gpus": 4, "judge_sglang": {"tp_size": 2}}
    config = make_config(checkpoint("qwen3"), {TP: 2}, rollout={"rollout_num_gpus": 2}, reward=reward)
    layout = ParallelLayout.of(config, world_size=8)
    assert layout.groups("tp") == [[0, 1]]
    assert layout.engine_groups() == [[2], [3]]
    assert layout.judge_groups() == [[4, 5], [6, 7]]
    assert layout.sides == {"trainers": range(2), "engines": range(2, 4), "judges": range(4, 8)}
    text = describe_plan(config, world_size=8, device_gib=6)
    for line in (
        "     1       1       0       0       0       -       -",
        "     3       -       -       -       -       1       -",
        "     6       -       -       -       -       -       1*",
        "ranks 4 to 7 judge, and do nothing else",
        "judges        2 of 2:  [4 5] [6 7]",
        "2 engines of 2 ranks; of each rank, estimated (GiB):",
    ):
        assert line in text, text


def test_a_second_policy_has_ranks_of_its_own() -> None:
    two = {"second_num_gpus": 2, "second_roles": ["b"]}
    reward = {"judge_hf_checkpoint": checkpoint("qwen3"), "judge_num_gpus": 1}
    config = make_config(
        checkpoint("qwen3"), {TP: 2}, rollout={"rollout_num_gpus": 1}, reward=reward, second_policy=two
    )
    layout = ParallelLayout.of(config, world_size=6)
    assert layout.sides == {
        "trainers": range(2),
        "engines": range(2, 3),
        "second_policy": range(3, 5),
        "judges": range(5, 6),
    }
    assert "ranks 3 to 4 train a second policy, with engines of its own" in describe_plan(config, world_size=6)
    alone = ParallelLayout.of(config.of_policy("second_policy"), world_size=2)
    assert alone.sides == {"": range(2)}
    assert alone.groups("tp") == [[0, 1]]
    assert checkpoint_bytes(config) == 2 * checkpoint_bytes(config.of_policy("second_policy"))


def test_the_memory_of_a_judge() -> None:
    judge = load_family(SHAPES["qwen3-4b"])
    reward = {"judge_hf_checkpoint": "random:qwen3-4b", "judge_num_gpus": 1}
    config = make_config(checkpoint("qwen3"), {}, reward=reward)
    estimate = estimate_judge(config)
    assert estimate.generating == 4 * judge.num_parameters()  # fp32
    assert estimate.training == 0
    text = describe_plan(config, world_size=2, device_gib=80)
    assert f"engine weights                    {estimate.generating / 2**30:>10,.3f}" in text.partition("\nJudge\n")[2]
    fits = int(((80 - 3) * 2**30) * 0.85 - estimate.generating) // estimate.kv_bytes_per_token
    assert f"KV cache: {fits:,} tokens;" in text
    tight = describe_plan(config, world_size=2, device_gib=8)
    assert "does not fit: no room for a KV cache in the 8 GiB of a device. What helps: in reward.judge_sglang" in tight


def test_apart_each_side_has_its_device() -> None:
    shape = SHAPES["qwen3-4b"]

    def estimate(**rollout: int) -> MemoryEstimate:
        config = make_config(Path("absent"), {}, rollout=rollout, refit={"update_weights_interval": 2})
        return estimate_memory(config, load_family(shape), ParallelLayout.of(config, world_size=2))

    together, apart = estimate(), estimate(rollout_num_gpus=1)
    assert together.training - apart.training == apart.engine_weights == apart.generating
    gained = apart.kv_tokens(139 << 30, 0.8) - together.kv_tokens(139 << 30, 0.8)
    assert gained == pytest.approx(0.8 * apart.trainer / apart.kv_bytes_per_token, abs=2)


# --- what is shipped -------------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "configs"
GPUS = {"0.6b": (1, 79), "1.7b": (1, 79), "4b": (8, 79), "8b": (8, 79), "30b_a3b": (8, 139)}  # and GiB of each


@pytest.mark.parametrize("name", GPUS)
def test_recipes_fit_the_gpus_that_they_are_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    world_size, device_gib = GPUS[name]
    model = f"hf_checkpoint=random:qwen3-{name.replace('_', '-')}"
    config = load_config(CONFIGS / f"grpo_qwen3_{name}.toml", [model], world_size=world_size, check_files=False)
    text = describe_plan(config, world_size, device_gib)
    assert "does not fit" not in text
    match = re.search(r"at most, .*: (\S+) while training, (\S+) while generating", text)
    assert match
    assert 20 < min(map(float, match.groups())) <= max(map(float, match.groups())) < device_gib


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.rglob("*.toml")) - set(CONFIGS.glob("grpo_*"))), ids=lambda p: p.stem
)
def test_other_recipes_have_a_plan(path: Path) -> None:
    model = checkpoint("qwen3")
    fits = ["max_tokens_per_gpu=512", "rollout_max_prompt_len=32", "rollout_max_response_len=8"]
    config = load_config(path, [f"hf_checkpoint={model}", f"teacher_load={model}", *fits], check_files=False)
    assert "while training" in describe_plan(config, world_size=2, device_gib=24)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [(999, "999"), (999_885_952, "1 billion"), (999_400_000, "999 million"), (26_123_000_000, "26.1 billion")],
)
def test_a_number_of_parameters_has_no_exponent(parameters: int, expected: str) -> None:
    assert _count(parameters) == expected
