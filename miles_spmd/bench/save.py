"""Time of a checkpoint: how long training waits for it, and for how long its state may not change; how long it takes to
write beside the training, how long to load; and how much slower a training step is while the checkpoint is written."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist

from miles_spmd.algorithms.losses import make_loss
from miles_spmd.bench.machine import everywhere, slowest, stage, timed
from miles_spmd.bench.result import Row
from miles_spmd.bench.train import random_batch
from miles_spmd.config import Config
from miles_spmd.models import load_family
from miles_spmd.training.background_save import BackgroundSave
from miles_spmd.training.trainer import Trainer

NAME = "bench-save"
WARM_UP = 1


def measure(config: Config, folder: str, offloaded: bool, repeats: int) -> list[Row]:
    """Measure saves of a trainer as it trains, or as it is ``offloaded``. Collective. Seconds are medians of the
    slowest rank, bytes are those of all ranks."""
    family = load_family(config.model.hf_checkpoint)
    stage("building the trainer")
    trainer = Trainer(config, family, make_loss("rl", config.algorithm))
    return [_row(trainer, Path(folder) / NAME, repeats, offloaded)]


def _row(trainer: Trainer, folder: Path, repeats: int, offloaded: bool) -> Row:
    batch, saving = random_batch(trainer.family, 1, 16, 1), BackgroundSave()
    stage(f"saves of {'an offloaded' if offloaded else 'a resident'} trainer")
    if offloaded:
        trainer.offload.move_out()
    reserve, _ = timed(lambda: _reserve(saving, trainer))
    trainer.offload.move_in()
    blocking, copying, writing, step, beside, load, nbytes = [], [], [], [], [], [], 0
    for repeat in range(WARM_UP + repeats):
        alone = timed(lambda: trainer.train_step(batch))[0]
        if offloaded:
            trainer.offload.move_out()
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        _, (waited, copied) = timed(partial(_save, saving, trainer, folder))
        trainer.offload.move_in()
        meanwhile = timed(lambda: trainer.train_step(batch))[0]
        progress = everywhere(saving.progress(wait=True))
        if problem := next((one.problem for one in progress if one.problem), ""):
            raise OSError(problem)
        digests = [one.digests["actor"] for one in progress]
        loaded = timed(partial(trainer.checkpoint.load, folder / "actor", digests))[0]
        nbytes = sum(one.nbytes for one in progress)
        if repeat >= WARM_UP:
            blocking.append(waited)
            copying.append(copied)
            writing.append(progress[dist.get_rank()].seconds)
            step.append(alone)
            beside.append(meanwhile)
            load.append(loaded)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return {
        "offloaded": offloaded,
        "GB": nbytes / 1e9,
        "host GiB": max(everywhere(saving.host_bytes)) / 2**30,
        "reserve s": reserve,
        "blocking s": slowest(blocking),
        "unchanged s": slowest(copying),
        "writing s": slowest(writing),
        "load s": slowest(load),
        "step s": slowest(step),
        "step while writing s": slowest(beside),
    }


def _save(saving: BackgroundSave, trainer: Trainer, folder: Path) -> tuple[float, float]:
    """Return the seconds until this rank goes on, and those until its state may change."""
    began = time.perf_counter()
    saving.start(folder, {"actor": trainer.checkpoint.content()})
    waited = time.perf_counter() - began
    saving.settle()
    return waited, time.perf_counter() - began


def _reserve(saving: BackgroundSave, trainer: Trainer) -> None:
    saving.reserve({"actor": trainer.checkpoint.content()})
    saving.settle()
