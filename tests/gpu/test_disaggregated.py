"""Trainers and engines on GPUs of their own: the same learning, and refits over NVLink and through NCCL."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import machine
from tests.gpu.test_grpo import TP2, learns
from tests.gpu.test_layouts import refit_through_buffers
from tests.models import tiny
from tests.ranks import Ranks
from tests.weights.test_trainer_to_engine import PP, TP, refit_and_compare

ENGINE = machine.ENGINE | {"cuda_graph_bs_decode": [1]}
DISTRIBUTED_OPTIMIZER = "megatron.use_distributed_optimizer=true"


@pytest.mark.parametrize(
    ("ranks", "dtype", "layout"),
    [
        pytest.param(2, "bfloat16", ["rollout.rollout_num_gpus=1"], marks=machine.needs(2)),
        pytest.param(2, "float32", ["rollout.rollout_num_gpus=1"], marks=machine.needs(2)),
        pytest.param(4, "bfloat16", ["rollout.rollout_num_gpus=2", *TP2], marks=machine.needs(4)),
        pytest.param(
            4,
            "bfloat16",
            ["rollout.rollout_num_gpus=2", DISTRIBUTED_OPTIMIZER, "sglang.tp_size=2"],
            marks=machine.needs(4),
        ),
    ],
)
def test_grpo_learns(warm: Path, ranks: int, dtype: str, layout: list[str]) -> None:
    learns(warm, ranks, dtype, layout)


@pytest.mark.parametrize("through", [refit_and_compare, refit_through_buffers], ids=["NVLink", "NCCL"])
@pytest.mark.parametrize(
    ("trainers", "name", "megatron", "engines", "engine_tp"),
    [
        pytest.param(1, "qwen3-tied", {}, 1, 1, marks=machine.needs(2)),
        pytest.param(2, "qwen3", {TP: 2, "sequence_parallel": True}, 2, 1, marks=machine.needs(4)),
        pytest.param(2, "qwen3", {PP: 2}, 2, 2, marks=machine.needs(4)),
    ],
)
def test_refit(
    ranks: Ranks, through: Any, trainers: int, name: str, megatron: dict[str, Any], engines: int, engine_tp: int
) -> None:
    arguments = tiny.checkpoint(name), megatron, ENGINE | {"tp_size": engine_tp}, "bfloat16", engines
    ranks.run(trainers + engines, through, *arguments)


@machine.needs(4)
def test_refit_of_a_real_shape(ranks: Ranks) -> None:
    """Qwen3-4B, trainer of TP2, two engines of TP1, 8 GB into each."""
    taken = ranks.run(4, refit_times, "random:qwen3-4b", {TP: 2, "sequence_parallel": True}, ENGINE, 2)
    slowest = {way: statistics.median(map(max, zip(*(rank[way] for rank in taken)))) for way in taken[0]}
    machine.measured("refit of Qwen3-4B from TP2 to two engines on GPUs of their own, ms", slowest)
    assert all(0 < ms < 1000 for ms in slowest.values())


def refit_times(
    model: str, megatron: dict[str, Any], server_args: dict[str, Any], rollout_num_gpus: int
) -> dict[str, list[float]]:
    """Milliseconds on this rank of refits from the moment on that all ranks were there, with checksums and without."""
    import torch
    import torch.distributed as dist

    from miles_spmd.config import Config
    from miles_spmd.config.load import make_tables
    from miles_spmd.generation.sglang.engine import SglangEngine
    from miles_spmd.models import load_family
    from miles_spmd.models.random import write_random_checkpoints
    from miles_spmd.training.network import Network
    from miles_spmd.weights import direct_refit
    from miles_spmd.weights.refit import Refit
    from miles_spmd.worker.world import take_side

    raw = {"model": {"hf_checkpoint": model}, "data": {"prompt_data": "none"}, "megatron": megatron}
    config = make_tables(Config, raw, [], source="test", check_files=False)
    folder = config.model.hf_checkpoint
    write_random_checkpoints([folder])
    side = take_side(rollout_num_gpus, timedelta(minutes=4))
    network = Network(config, load_family(folder), folder) if side.trains else None
    engine = SglangEngine(folder, dtype="bfloat16", server_args=server_args) if side.generates else None
    held = (network.weights(), network.layout()) if network else ({}, [])
    wanted = (engine.weights(), engine.layout()) if engine else ({}, [])
    times: dict[str, list[float]] = {}
    arrived: list[dict[str, torch.Tensor]] = []
    map_peers = direct_refit.map_peers
    for way, mapping in (("NVLink", map_peers), ("NCCL", lambda *_: None)):
        direct_refit.map_peers = mapping
        refit = Refit(*held, *wanted, bucket_bytes=256 << 20, group=side.everyone)
        for tensor in wanted[0].values():
            tensor.zero_()
        for refit.checksums in (True, False):
            name = f"{way}, {'with' if refit.checksums else 'without'} checksums"
            times[name] = []
            for repeat in range(8):
                torch.cuda.synchronize()
                dist.barrier(side.everyone)
                began = time.perf_counter()
                refit.run()
                torch.cuda.synchronize()
                if repeat > 2:
                    times[name].append(1e3 * (time.perf_counter() - began))
        arrived.append({tensor_name: tensor.clone() for tensor_name, tensor in wanted[0].items()})
    direct_refit.map_peers = map_peers
    assert all(torch.equal(tensor, arrived[1][tensor_name]) for tensor_name, tensor in arrived[0].items())
    if engine is not None:
        assert all(tensor.count_nonzero() > tensor.numel() // 2 for tensor in arrived[0].values())
        engine.close()
    return times
