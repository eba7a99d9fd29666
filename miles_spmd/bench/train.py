"""Speed of the trainer at several packings: tokens per second, model FLOP utilisation, peak memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from miles_spmd.algorithms.losses import make_loss
from miles_spmd.bench.flops import peak_tflops
from miles_spmd.bench.machine import slowest, stage, timed
from miles_spmd.bench.result import Row
from miles_spmd.config import Config
from miles_spmd.models import Family, load_family
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence

WARM_UP = 2


def measure(config: Config, packings: Sequence[tuple[int, int]], micro_batches: int, repeats: int) -> list[Row]:
    """Measure every packing (sequences of a micro-batch, tokens of each). Collective."""
    family = load_family(config.model.hf_checkpoint)
    stage("building the trainer")
    trainer = Trainer(config, family, make_loss("rl", config.algorithm))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows = []
    for sequences, tokens in packings:
        batch = random_batch(family, sequences, tokens, micro_batches)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        stage(f"training on {micro_batches} x {sequences} x {tokens} tokens")
        steps = [timed(lambda: trainer.train_step(batch))[0] for _ in range(WARM_UP + repeats)]  # noqa: B023
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        stage("scoring them")
        scores = [timed(lambda: trainer.log_probs(batch))[0] for _ in range(WARM_UP + repeats)]  # noqa: B023
        stage("moving out and in")
        moves = [(timed(trainer.offload.move_out), timed(trainer.offload.move_in)) for _ in range(WARM_UP + repeats)]
        step, score = slowest(steps[WARM_UP:]), slowest(scores[WARM_UP:])
        total = micro_batches * sequences * tokens * trainer.where.dp_size
        flops = total / tokens * family.flops(tokens) / step / dist.get_world_size() / 1e12
        rows.append(
            {
                "packed": f"{micro_batches} x {sequences} x {tokens}",
                "step s": step,
                "tokens/s": total / step,
                "TFLOP/s per GPU": flops,
                "MFU %": 100 * flops / peak_tflops(device),
                "peak GiB": peak,
                "log-probs tokens/s": total / score,
                "offloaded GiB": moves[-1][0][1] / 2**30,
                "offload s": slowest([out for (out, _), _ in moves[WARM_UP:]]),
                "onload s": slowest([back for _, (back, _) in moves[WARM_UP:]]),
            }
        )
    return rows


def random_batch(family: Family, sequences: int, tokens: int, micro_batches: int) -> list[MicroBatch]:
    """Return micro-batches of random tokens, with equal loss weights for all but the first token of a sequence."""
    rng = np.random.default_rng(0)
    weights = np.full(tokens, 1 / (tokens * sequences * micro_batches), np.float32)
    weights[0] = 0

    def sequence() -> TrainSequence:
        ids = rng.integers(0, family.vocab_size, tokens, np.int32)
        advantages = np.full(tokens, rng.choice([-1.0, 1.0]), np.float32)
        return TrainSequence(ids, weights, advantages, np.full(tokens, -np.log(family.vocab_size), np.float32))

    return [[sequence() for _ in range(sequences)] for _ in range(micro_batches)]
