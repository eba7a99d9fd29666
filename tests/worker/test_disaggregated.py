"""Trainers and engines on ranks of their own make the run that they make when they share ranks, bit for bit.

Real Megatron, SGLang and gloo in processes that stay up from run to run; the controller's loop runs in this one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file

from miles_spmd.config import Config
from miles_spmd.config.load import config_digest, load_config
from miles_spmd.controller import attempts
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.journal.stopping import Stopping
from miles_spmd.controller.tasks import run
from miles_spmd.ledger.chain import Record, read_record
from miles_spmd.ledger.compare import compare
from miles_spmd.protocol.messages import Hello, Reply
from miles_spmd.protocol.pipe import Credentials
from miles_spmd.protocol.results import Ok
from miles_spmd.protocol.router import Router
from miles_spmd.types.engine_group import JUDGE, POLICY
from miles_spmd.worker.stopwatch import Stopwatch
from tests.ranks import Ranks
from tests.service import EndingDealer, Unwatched
from tests.worker.tiny_run import write_checkpoint, write_config

TP2 = "megatron.tensor_model_parallel_size=2"
ENGINE_TP2 = "sglang.tp_size=2"


def serve(credentials: bytes, config: Config, lasts: str) -> None:
    """A rank of a run, until it is told to stop; an engine must then hold what the trainers have exported, a judge what
    it has read."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from miles_spmd.worker.main import Place, rank_info
    from miles_spmd.worker.memory_account import MemoryAccount
    from miles_spmd.worker.service import Service
    from miles_spmd.worker.worker import Worker
    from miles_spmd.worker.world import take_side

    place = Place(dist.get_rank(), dist.get_world_size(), 0, dist.get_world_size(), "")
    side = take_side(config.rollout.rollout_num_gpus, timedelta(minutes=2), config.reward.judge_num_gpus)
    own = msgspec.json.decode(credentials, type=list[Credentials])[place.rank]
    dealer, watch = EndingDealer(own, lambda: not Path(lasts).exists()), Stopwatch()
    memory = MemoryAccount(config, place.world_size, side.trains, side.generates, group=side.group)
    worker = Worker(config, "train", side, place.rank, watch, memory)
    service = Service(worker, place.rank, dealer, Unwatched(), watch)
    dealer.send(Hello(rank_info(worker, place), config_digest(config), watch.take()))
    dealer.send(Reply(service.run().id, place.rank, "host", Ok()))
    dealer.close()
    if side.generates:
        engine: Any = worker.turns.engine
        held = {name: tensor.clone() for name, tensor in engine.weights().items()}
        source = config.run_dir / "export" if side.group == POLICY else config.engine_group(JUDGE).hf_checkpoint
        engine._model.load_weights(load_file(source / "model.safetensors").items())
        assert all(torch.equal(held[name], tensor) for name, tensor in engine.weights().items())
        engine.close()


def train(ranks: Ranks, world_size: int, recipe: Path, folder: Path, *overrides: str) -> Record:
    """A run in ``folder``; what its ledger says of it."""
    settings = [f"run.output_dir={folder.parent}", f"run.name={folder.name}", "progress=none", "export_final=true"]
    settings += ["save_interval=2", "start_timeout=240", *overrides]
    config = load_config(recipe, settings, world_size=world_size)
    router, errors = Router(ranks=world_size), list[BaseException]()
    lasts = TemporaryDirectory()
    arguments = world_size, serve, msgspec.json.encode(router.credentials), config, lasts.name
    thread = threading.Thread(target=_keep, args=(errors, lambda: ranks.run(*arguments)))
    thread.start()
    attempt = attempts.begin(config.run_dir, "train", world_size)
    workers = Cluster(router, world_size, config.deadlines, config_digest(config), attempt.folder)
    try:
        run(config, workers, attempt, Stopping(config.run_dir))
        workers.stop()
    finally:
        attempt.end("finished", "finished")
        attempt.close()
        lasts.cleanup()
        router.close()
        thread.join()
        assert not errors, errors[0]  # it explains what the controller says
    return read_record(folder)


def _keep(errors: list[BaseException], function: Callable[[], Any]) -> None:
    """A failed test's exception, which would end its thread and no more."""
    try:
        function()
    except BaseException as error:
        errors.append(error)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    reward = {"rm_type": "tests.worker.rewards:by_length"}
    return write_config(folder, write_checkpoint(folder / "model"), reward=reward, megatron={"lr": 1e-2})


@pytest.mark.parametrize(
    ("trainers", "engines", "layout"),
    [
        pytest.param(1, 1, [], id="1+1"),
        pytest.param(1, 2, [], id="1+2"),
        pytest.param(2, 1, [TP2], id="TP2+1"),
        pytest.param(2, 1, [], id="DP2+1"),
        pytest.param(2, 2, [TP2, ENGINE_TP2], id="TP2+TP2"),
        pytest.param(2, 2, [TP2], id="TP2+2"),
    ],
)
def test_the_same_run(
    ranks: Ranks, recipe: Path, tmp_path: Path, trainers: int, engines: int, layout: list[str]
) -> None:
    colocated = train(ranks, trainers, recipe, tmp_path / "colocated", *layout)
    apart = train(ranks, trainers + engines, recipe, tmp_path / "apart", f"rollout_num_gpus={engines}", *layout)
    found = compare(colocated, apart)
    assert (found.steps, found.difference) == ([0, 1, 2], "")


def test_resumes_where_it_was(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    whole = train(ranks, 2, recipe, tmp_path / "whole", "rollout_num_gpus=1")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_000002"
    resumed = train(ranks, 2, recipe, tmp_path / "resumed", "rollout_num_gpus=1", f"checkpoint.load={checkpoint}")
    found = compare(whole, resumed)
    assert (found.steps, found.difference) == ([2], "")
