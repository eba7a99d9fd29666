"""Requests of measurements: random tokens, responses of a fixed length."""

from __future__ import annotations

import numpy as np

from miles_spmd.generation.engine import Engine
from miles_spmd.types.request import Output, Request, SamplingParams


def random_requests(count: int, prompt_tokens: int, response_tokens: int, vocab_size: int) -> list[Request]:
    """Return ``count`` requests, the same ones each time, with seeds 0, 1, ..."""
    prompts = np.random.default_rng(0).integers(0, vocab_size, (count, prompt_tokens)).tolist()
    return [Request(str(i), prompts[i], SamplingParams(response_tokens, ignore_eos=True, seed=i)) for i in range(count)]


def generate(engine: Engine, requests: list[Request]) -> list[Output]:
    """Return the outputs of ``requests`` when all have finished. Called on every rank of an engine."""
    engine.submit(requests)
    outputs = []
    while not engine.idle:
        outputs += engine.step()
    return outputs
