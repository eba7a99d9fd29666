"""An engine and a trainer side by side, over steps that change the weights, and the differences of their log-probs."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles_spmd.config import Config
from miles_spmd.types.request import Output, Request
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence
from tests.generation.conformance import request, run
from tests.models import tiny

PROMPTS, SAMPLES = 12, 4


@dataclass
class Comparison:
    """The differences over the tokens that a rank's trainer has scored; zeros where the rank does not report."""

    tokens: int = 0
    mismatches: int = 0
    largest: float = 0.0  # max abs diff
    grad_norms: list[float] = field(default_factory=list)
    rollout_s: float = 0.0  # of the last step
    log_probs_s: float = 0.0

    def add(self, decoded: list[float], score: np.ndarray) -> None:
        gap = np.abs(score[-len(decoded) :] - np.asarray(decoded, np.float32))
        self.tokens += len(gap)
        self.mismatches += int((gap != 0).sum())
        self.largest = max(self.largest, float(gap.max()))


def checkpoint(folder: Path, name: str, **more: Any) -> Path:
    """Write the tiny model ``name`` into ``folder``, with MLP widths that a CPU engine does not round up."""
    _, changes = tiny.CONFIGS[name]
    shape: dict[str, Any] = {"intermediate_size": 128}
    if "moe_intermediate_size" in changes:
        shape |= {"moe_intermediate_size": 32}
    if "num_experts" in changes:
        shape |= {"num_experts": 8, "num_experts_per_tok": 4}
    torch.manual_seed(0)
    tiny.new(name, **(shape | more)).save_pretrained(folder)
    return folder


def requests(
    rng: np.random.Generator, vocab_size: int, prompt: int, response: int, temperature: float
) -> list[Request]:
    """Return requests of several responses to each prompt: prompts of ``prompt`` to three times as many tokens,
    responses of ``response`` to twice as many."""
    lengths = np.linspace(prompt, 3 * prompt, PROMPTS).astype(int)
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
    return [
        request(
            f"{p}-{s}",
            prompts[p],
            seed=int(rng.integers(2**40)),
            ignore_eos=True,
            max_new_tokens=response * (SAMPLES + s) // SAMPLES,
            temperature=temperature,
        )
        for p, s in itertools.product(range(PROMPTS), range(SAMPLES))
    ]


def sequence(request: Request, output: Output, advantage: float) -> TrainSequence:
    tokens = np.asarray(request.input_ids + output.output_ids, np.int32)
    weights = (np.arange(len(tokens)) >= len(request.input_ids)).astype(np.float32)
    return TrainSequence(
        tokens, weights / weights.sum() / PROMPTS / SAMPLES, np.full(len(tokens), advantage, np.float32)
    )


def train_and_compare(config: Config, steps: int, prompt: int, response: int, micro_batches: int) -> Comparison:
    """Run ``steps`` steps and compare log-probs. Every engine generates for the same requests; a replica of the trainer
    takes its share of them, in a random order and in ``micro_batches``, compares, and makes an update with arbitrary
    advantages."""
    from miles_spmd.algorithms.losses import make_loss
    from miles_spmd.models import load_family
    from miles_spmd.training.trainer import Trainer
    from miles_spmd.weights.refit import Refit
    from miles_spmd.worker.worker import make_engine

    family = load_family(config.model.hf_checkpoint)
    trainer = Trainer(config, family, make_loss("rl", config.algorithm))
    engine = make_engine(config)
    rng, found = np.random.default_rng(0), Comparison()
    try:
        refit = Refit(trainer.weights(), trainer.layout(), engine.weights(), engine.layout(), bucket_bytes=256 << 20)
        for step in range(steps):
            refit.run()
            engine.commit(step)
            issued = requests(rng, family.vocab_size, prompt, response, config.rollout.rollout_temperature)
            began = time.perf_counter()
            outputs = run(engine, issued)
            found.rollout_s = time.perf_counter() - began
            own = rng.permutation(len(issued))[trainer.where.dp_rank :: trainer.where.dp_size].tolist()
            shares = [own[i::micro_batches] for i in range(micro_batches)]
            batch: list[MicroBatch] = [
                [sequence(issued[i], outputs[issued[i].rid], (-1.0) ** (i + step)) for i in part] for part in shares
            ]
            began = time.perf_counter()
            scores = trainer.log_probs(batch).log_probs
            found.log_probs_s = time.perf_counter() - began
            for i, score in zip(itertools.chain(*shares), scores or ()):
                found.add(outputs[issued[i].rid].output_log_probs, score)
            found.grad_norms.append(trainer.train_step(batch).grad_norm)
    finally:
        engine.close()
    return found
