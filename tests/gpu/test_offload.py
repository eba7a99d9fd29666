"""A trainer's moments go to pinned host memory and come back bit for bit; the device's memory is free meanwhile."""

from __future__ import annotations

import time

import psutil
import pytest
import torch

from miles_spmd.config.schema import Config
from miles_spmd.models.random import random_checkpoint
from tests.gpu.machine import measured, needs
from tests.ranks import Ranks
from tests.training.cases import ZERO, build, config, sequences


def host_memory(run: Config) -> dict[str, float]:
    """By how much the process grows when the trainer moves out, and how fast that is the next time."""
    trainer = build(run)
    before = psutil.Process().memory_info().rss
    needed = trainer.memory().optimizer
    trainer.move_out()
    assert trainer._offload._host.is_pinned()
    grown = psutil.Process().memory_info().rss - before
    seconds = {}
    for name, move in (("in", trainer.move_in), ("out", trainer.move_out)):
        torch.cuda.synchronize()
        began = time.perf_counter()
        move()
        torch.cuda.synchronize()
        seconds[f"{name}, GB/s"] = needed / (time.perf_counter() - began) / 1e9
    return {"needed, GiB": needed / 2**30, "taken, GiB": grown / 2**30} | seconds


@needs(1)
def test_no_more_host_memory_than_needed(ranks: Ranks) -> None:
    run = config("qwen3", model={"dtype": "bfloat16", "hf_checkpoint": random_checkpoint("random:qwen3-0.6b")})
    (found,) = ranks.run(1, host_memory, run)
    measured("host memory of a trainer that moves out, Qwen3-0.6B", found)
    assert found["taken, GiB"] == pytest.approx(found["needed, GiB"], rel=0.05)


def there_and_back(run: Config) -> None:
    trainer = build(run)
    trainer.train_step([sequences((30, 40))])
    trainer.move_out()  # host memory is there now
    trainer.move_in()
    offload = trainer._offload
    before = [tensor.clone() for tensor in offload._state()]
    allocated = torch.cuda.memory_allocated()
    moved = trainer.move_out()
    assert allocated - torch.cuda.memory_allocated() >= moved > 0
    scribbled = torch.full((allocated,), 255, dtype=torch.uint8, device="cuda")  # over what was freed
    del scribbled
    assert trainer.move_in() == moved
    for tensor, expected in zip(offload._state(), before, strict=True):
        assert torch.equal(tensor, expected)
    assert not trainer.train_step([sequences((30, 40))]).skipped


@needs(1)
def test_there_and_back(ranks: Ranks) -> None:
    for layout in ({}, ZERO):
        ranks.run(1, there_and_back, config("qwen3", layout, model={"dtype": "bfloat16"}))
