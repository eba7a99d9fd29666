"""What the last pipeline stage computes at the scored positions: a policy's log-probs, or a value head's values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from miles_spmd.config import Config
from miles_spmd.training.candidates import log_probs_of, top_candidates
from miles_spmd.training.log_probs import Distribution, linear_log_probs
from miles_spmd.training.output_layer import OutputLayer


@dataclass(frozen=True)
class Scoring:
    """Which numbers a policy's head computes. A value head computes its one number whatever this is."""

    distribution: Distribution
    differentiate_entropy: bool = False
    invariant: bool = False  # log-probs bitwise equal to the engine's
    top_k: int = 0  # number of candidates: top tokens of each position, with their log-probs

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return what training asks for: log-probs under the distribution that responses are sampled from.

        Greedy sampling trains the plain distribution, whose log-probs engines report then.
        """
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
    """One number per position, fp32 [S]. Every tensor-parallel rank holds and computes the whole head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


def score(
    hidden: Tensor, targets: Tensor, candidates: Tensor | None, scoring: Scoring, layer: OutputLayer
) -> tuple[Tensor, ...]:
    """Return log-probs of ``targets`` and the entropy, fp32 [S]; with ``top_k`` also ids (int32) and log-probs (fp32)
    of the top tokens, [S, top_k]; with ``candidates`` (ids [S, K]) also their log-probs, fp32 [S, K].

    ``hidden`` [S, H] is the same on all tensor-parallel ranks. Candidates are compared over the whole vocabulary, also
    where sampling was cut by top-k or top-p.
    """
    outputs: tuple[Tensor, ...] = linear_log_probs(
        hidden,
        replace(layer, invariant=scoring.invariant),
        targets,
        scoring.distribution,
        differentiate_entropy=scoring.differentiate_entropy,
    )
    uncut = Distribution(scoring.distribution.temperature)
    if scoring.top_k:
        outputs += top_candidates(hidden, layer, scoring.top_k, uncut)
    if candidates is not None:
        outputs += (log_probs_of(hidden, layer, candidates, uncut),)
    return outputs
