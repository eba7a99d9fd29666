"""Training with offloading between steps gives the same results as training without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from miles_spmd.config import Config
from tests.ranks import Ranks
from tests.training.cases import EP2, PP2, ZERO, build, config, held, sequences, share

BATCH = sequences((5, 17, 40, 9, 30, 31, 2, 12))


def steps(run: Config, offload: bool) -> tuple[list[Any], Any, int, int]:
    """Return the results of three steps and of the log-probs between them, the weights, the bytes moved out, and the
    bytes of weights."""
    trainer = build(run)
    weights = trainer.weights()
    results, moved = [], 0
    for _ in range(3):
        results.append(trainer.train_step(share(BATCH, trainer)))
        if offload:
            before = {name: weight.clone() for name, weight in weights.items()}
            moved = trainer.offload.move_out()
            assert trainer.offload.move_out() == 0
            assert trainer._chunks
            for chunk in trainer._chunks:
                assert chunk.buffers
                assert all(buffer.grad_data.untyped_storage().nbytes() == 0 for buffer in chunk.buffers)
            for name, weight in weights.items():  # a refit reads them meanwhile
                assert torch.equal(weight, before[name]), name
            assert trainer.offload.move_in() == moved
        results.append(trainer.log_probs(share(BATCH, trainer)))
    return results, held(trainer), moved, sum(weight.nbytes for weight in weights.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "layout"), [("qwen3", ZERO), ("qwen3-tied", PP2), ("qwen3_moe", EP2)])
def test_nothing_changes(ranks: Ranks, name: str, layout: dict[str, Any], dtype: str) -> None:
    run = config(name, layout | {"lr": 1e-2}, model={"dtype": dtype})
    plain, offloaded = (ranks.run(2, steps, run, offload) for offload in (False, True))
    for (expected, weights, _, _), (results, weights_after, moved, weight_bytes) in zip(plain, offloaded):
        assert repr(results) == repr(expected)
        assert weights.weights.keys() == weights_after.weights.keys()
        for tensor_name, tensor in weights.weights.items():
            np.testing.assert_array_equal(tensor, weights_after.weights[tensor_name], tensor_name)
        shards = 2 if layout == ZERO else 1
        itemsize = 4 if dtype == "float32" else 2
        state = (8 if dtype == "float32" else 12) / shards + 4  # moments, main parameters; gradients
        assert moved == pytest.approx(weight_bytes / itemsize * state, rel=0.1)
