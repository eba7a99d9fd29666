"""What the last pipeline stage computes at the scored positions: log-probs by a policy, one value by a value head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from miles_spmd.config import Config
from miles_spmd.training.log_probs import Distribution, linear_log_probs, log_probs_of, top_candidates


@dataclass(frozen=True)
class Scoring:
    """What is asked of a policy; a value head has one answer."""

    distribution: Distribution
    differentiate_entropy: bool = False
    invariant: bool = False  # as the engine computes them
    top_k: int = 0  # so many most likely tokens are named

    @classmethod
    def of(cls, config: Config) -> Self:
        """Log-probs of the distribution that is trained: the one that was sampled from. Greedy sampling trains the
        plain one, whose log-probs engines report then."""
        invariant = config.determinism.parity == "bitwise"
        if config.run.mode != "rl":
            return cls(Distribution(), invariant=invariant)
        r = config.rollout
        distribution = Distribution(r.rollout_temperature or 1.0)
        if r.rollout_temperature > 0 and r.rollout_top_k != 1:
            distribution = replace(distribution, top_p=r.rollout_top_p, top_k=r.rollout_top_k)
        return cls(distribution, config.algorithm.entropy_coef != 0, invariant)

    def with_candidates(self, top_k: int) -> Self:
        return replace(self, top_k=top_k)


class ValueHead(torch.nn.Module):
    """One number per position, fp32 [S]. Every tensor-parallel rank holds and computes the whole of it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        where = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=where))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


@dataclass(frozen=True)
class OutputLayer:
    """This tensor-parallel rank's part of the vocabulary."""

    weight: Tensor  # [V, H], the output vectors of the tokens from first_id on
    first_id: int
    vocab_size: int  # of the whole model; ids from here on are padding
    group: dist.ProcessGroup


def score(
    hidden: Tensor, targets: Tensor, candidates: Tensor | None, scoring: Scoring, layer: OutputLayer
) -> tuple[Tensor, ...]:
    """Log-probs and entropy, fp32 [S]; with ``top_k`` also ids (int32) and log-probs of the most likely tokens
    [S, top_k]; with ``candidates`` (ids [S, K]) also their log-probs, fp32 [S, K].

    ``hidden`` [S, H] is the same on all tensor-parallel ranks. Candidates are compared over the whole vocabulary, also
    where sampling was cut by top-k or top-p.
    """
    where: dict[str, Any] = {"first_id": layer.first_id, "vocab_size": layer.vocab_size, "group": layer.group}
    outputs: tuple[Tensor, ...] = linear_log_probs(
        hidden,
        layer.weight,
        targets,
        scoring.distribution,
        differentiate_entropy=scoring.differentiate_entropy,
        invariant=scoring.invariant,
        **where,
    )
    whole = Distribution(scoring.distribution.temperature)
    if scoring.top_k:
        outputs += top_candidates(hidden, layer.weight, scoring.top_k, whole, **where)
    if candidates is not None:
        outputs += (log_probs_of(hidden, layer.weight, candidates, whole, **where),)
    return outputs
