"""Policy losses, as a user might plug them in, that keep other ranks waiting, or that compile something."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spmd.algorithms.losses import ppo
from miles_spmd.config import AlgorithmConfig
from miles_spmd.types.token_batch import TokenBatch

SECONDS = 0.3  # per micro-batch: many times what a micro-batch takes


def hangs_on_rank_1(log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Never returns on rank 1."""
    if dist.get_rank() == 1:
        time.sleep(600)
    return ppo(log_probs, tokens, algorithm)


def broadcasts_on_rank_1(log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Has a collective of its own on rank 1, and another one on the others: an error that only shows as a hang."""
    if dist.get_rank() == 1:
        dist.broadcast(torch.zeros(3), src=0)
    else:
        dist.all_reduce(torch.zeros(3))
    return ppo(log_probs, tokens, algorithm)


def sleeps_on_rank_1(log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Takes longer on rank 1."""
    if dist.get_rank() == 1:
        time.sleep(SECONDS)
    return ppo(log_probs, tokens, algorithm)


def compiles(log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Leaves what a compiled kernel leaves, unless it is there."""
    kernel = Path(os.environ["TRITON_CACHE_DIR"], "abc", "kernel.cubin")
    if not kernel.exists():
        kernel.parent.mkdir(parents=True, exist_ok=True)
        kernel.write_bytes(b"code")
    return ppo(log_probs, tokens, algorithm)
