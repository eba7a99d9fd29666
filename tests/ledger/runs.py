"""Whole runs in this process and the ranks of tests/ranks.py: the real loop and real workers, started in a second."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.config.load import config_digest, load_config
from miles_spmd.controller import attempts
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.journal.stopping import Stopping
from miles_spmd.controller.loops import replay
from miles_spmd.controller.run_folder import describe
from miles_spmd.controller.tasks import run
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Heartbeat, Hello, Reply
from miles_spmd.protocol.pipe import REQUEUE, Credentials, Replay
from miles_spmd.protocol.results import Ok
from miles_spmd.protocol.router import Router
from miles_spmd.types.phase import Phase
from miles_spmd.worker.main import HOST, Place, build, rank_info
from miles_spmd.worker.service import Service
from miles_spmd.worker.stopwatch import Stopwatch
from miles_spmd.worker.watchdog import obey
from tests.ranks import Ranks
from tests.service import EndingDealer, Unwatched
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config

STEPS = 4


class SideThread(threading.Thread):
    """What a watchdog does for a command that all ranks leave. The real one would take over this process's signals."""

    def __init__(self, rank: int, credentials: Credentials) -> None:
        super().__init__(daemon=True)
        self.rank, self.credentials, self.over = rank, credentials, False

    def run(self) -> None:
        dealer = Dealer(self.credentials)
        while not self.over:
            dealer.try_send(Heartbeat(self.rank, Phase.IDLE, 0))
            if dealer.incoming.poll(200):
                obey(self.rank, dealer)
        dealer.close()


def serve(settings: str, credentials: bytes, lasts: str, has_side: bool) -> None:
    """A rank while the run lasts, which it does as long as a folder exists: a run may end before this rank connects."""
    from miles_spmd.worker.world import take_side

    config = Config.model_validate_json(settings)
    rank, size = dist.get_rank(), dist.get_world_size()
    own = msgspec.json.decode(credentials, type=list[Credentials])[rank]
    dealer, side = EndingDealer(own, lambda: not os.path.exists(lasts)), SideThread(rank, own)
    if has_side:
        side.start()
    place = Place(rank, size, rank, size, "127.0.0.1")
    others = config.reward.judge_num_gpus, config.second_policy.second_num_gpus
    duties = take_side(config.rollout.rollout_num_gpus, timedelta(minutes=2), *others)
    worker = build(config, "train", place, duties, Stopwatch(), lambda text: None)
    service = Service(worker, rank, dealer, Unwatched(), Stopwatch())
    dealer.send(Hello(rank_info(worker, place), config_digest(config)))
    dealer.send(Reply(service.run().id, rank, HOST, Ok()))
    side.over = True
    if has_side:
        side.join()
    if worker.engine_rank is not None:
        worker.turns.engine.close()  # a process has room for one of SGLang's
    dealer.close()


def train(ranks: Ranks, config: Config, size: int = 1, wanted: Replay | None = None) -> Path:
    """The run's folder."""
    assert ended(ranks, config, size, wanted) == ""
    return config.run_dir


def ended(
    ranks: Ranks, config: Config, size: int = 1, wanted: Replay | None = None, stopping: Stopping | None = None
) -> str:
    """What a run says that was requested to stop; "" otherwise."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    task = "train" if wanted is None else "replay"
    describe(config, task)
    router = Router(ranks=size)
    credentials = msgspec.json.encode(router.credentials)
    lasts = TemporaryDirectory()
    arguments = (size, serve, config.model_dump_json(), credentials, lasts.name, bool(stopping))
    thread = threading.Thread(target=ranks.run, args=arguments)
    thread.start()
    attempt = attempts.begin(config.run_dir, task, size)
    workers = Cluster(router, size, config.deadlines, config_digest(config), attempt.folder)
    try:
        said = run(config, workers, attempt, stopping or Stopping(config.run_dir), wanted)
        workers.stop(REQUEUE if said else 0)
        attempt.end("stopped" if said else "finished", said or "finished")
        attempt.close()
    finally:
        lasts.cleanup()
        router.close()
        thread.join()
    return said


def replayed(ranks: Ranks, folder: Path, step: int, phase: Any = None) -> tuple[Path, Replay]:
    """The replay's folder, as `miles-spmd replay` makes it."""
    wanted, overrides = replay.plan(folder, step, phase)
    return train(ranks, load_config(folder / "config.toml", overrides), wanted=wanted), wanted


class Recipe:
    """A run with a filter that drops groups and two optimizer steps a rollout, on a small engine."""

    def __init__(self, folder: Path) -> None:
        self.model = write_checkpoint(folder / "model")
        self.file = write_config(
            folder,
            self.model,
            run={"num_rollout": STEPS},
            rollout={"engine": REFERENCE_ENGINE, "n_samples_per_prompt": 3},
            algorithm={"dynamic_sampling_filter": "reward_nonzero_std"},
            reward={"rm_type": "tests.recipe_run:coin", "reward_workers": 1},
            train={"global_batch_size": 6},
            determinism={"deterministic": True},
            telemetry={"progress": "none"},
            megatron={"lr": 1e-3},
        )

    def config(self, name: str, *overrides: str) -> Config:
        return load_config(self.file, [f"run.name={name}", "checkpoint.save_interval=2", *overrides])
