"""A trainer's moments go to pinned host memory and come back bitwise equal; the device's memory is free meanwhile."""

from __future__ import annotations

import torch

from miles_spmd.config import Config
from tests.gpu.machine import needs
from tests.ranks import Ranks
from tests.training.cases import ZERO, build, config, sequences


def there_and_back(run: Config) -> None:
    trainer = build(run)
    trainer.train_step([sequences((30, 40))])
    trainer.offload.move_out()  # host memory is there now
    trainer.offload.move_in()
    offload = trainer.offload
    before = [tensor.clone() for tensor in offload._state()]
    allocated = torch.cuda.memory_allocated()
    moved = trainer.offload.move_out()
    assert allocated - torch.cuda.memory_allocated() >= moved > 0
    scribbled = torch.full((allocated,), 255, dtype=torch.uint8, device="cuda")  # over what was freed
    del scribbled
    assert trainer.offload.move_in() == moved
    for tensor, expected in zip(offload._state(), before, strict=True):
        assert torch.equal(tensor, expected)
    assert not trainer.train_step([sequences((30, 40))]).skipped


@needs(1)
def test_there_and_back(ranks: Ranks) -> None:
    for layout in ({}, ZERO):
        ranks.run(1, there_and_back, config("qwen3", layout, model={"dtype": "bfloat16"}))
