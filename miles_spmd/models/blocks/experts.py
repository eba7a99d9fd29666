"""A mixture of experts: how a token's experts are chosen and weighted, and what an expert computes.

The formulas are those of :mod:`miles_spmd.invariant.experts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CORRECTION_BIAS = "e_score_correction_bias"
"""The last part of its name in every checkpoint that has one."""


def is_trained(name: str) -> bool:
    """Return whether gradients update a tensor of a checkpoint: all but correction biases, which have none."""
    return name.rpartition(".")[2] != CORRECTION_BIAS


@dataclass(frozen=True)
class Router:
    """The choice of ``per_token`` of ``count`` experts. Raises ValueError for values that do not fit together.

    Every expert has a score. The experts with the highest scores are chosen, and their scores are their weights. A
    correction bias, or a choice of groups before that of experts, changes the choice and no weight.
    """

    count: int
    per_token: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Of the logits, over all experts or of each one."""
    softmax_first: bool = True
    """False: experts are chosen by their logits, and weights are the softmax over the chosen ones. It equals a softmax
    over all experts whose chosen probabilities are divided by their sum, which is described in this way (Mixtral,
    gpt-oss, and Qwen with ``norm_topk_prob``)."""
    bias: bool = False
    """A number per expert is added to its score for the choice only: ``e_score_correction_bias`` of DeepSeek-V3,
    GLM-4.5 and MiniMax-M2 (https://arxiv.org/abs/2408.15664)."""
    normalize: bool = False
    """Weights are divided by their sum."""
    groups: int = 1
    """Experts are chosen from ``groups_per_token`` of so many equal groups of neighbours."""
    groups_per_token: int = 1
    best_of_group: int = 1
    """A group's score is the sum of so many of its highest: 1 in DeepSeek-V2, 2 in DeepSeek-V3 and GLM-4.5."""
    scale: float = 1.0
    """The last factor of every weight: ``routed_scaling_factor``."""
    logit_dtype: Literal["fp32", "model"] = "model"
    """In which dtype logits are computed from hidden states and weights of the model's."""
    logit_bias: bool = False
    """Logits have a bias, as any linear layer may (gpt-oss)."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.per_token <= self.count:
            problems.append(f"{self.per_token} of {self.count} experts cannot be chosen")
        if not self.softmax_first and (self.scores != "softmax" or self.bias or self.normalize or self.groups > 1):
            problems.append("softmax_first=False is for a softmax without correction bias, groups and normalize")
        if not self.softmax_first and self.per_token == 1:
            problems.append("the weight of one expert among the chosen ones is always 1, which Megatron-core refuses")
        if self.scores == "softmax" and self.normalize and not self.bias and self.groups == 1:
            problems.append("normalize for a plain softmax: softmax_first=False has the same weights; leave it out")
        if self.count % self.groups:
            problems.append(f"{self.count} experts cannot be divided into {self.groups} groups")
        elif self.groups > 1:
            size = self.count // self.groups
            if not 0 < self.groups_per_token <= self.groups or self.per_token > self.groups_per_token * size:
                groups = f"{self.groups_per_token} of {self.groups} groups of {size}"
                problems.append(f"{self.per_token} experts cannot be chosen from {groups}")
            if not 0 < self.best_of_group <= size:
                problems.append(f"best_of_group: a group of {size} experts has no {self.best_of_group} best")
        elif (self.groups_per_token, self.best_of_group) != (1, 1):
            problems.append("groups_per_token and best_of_group are for several groups")
        if problems:
            raise ValueError("router: " + "; ".join(problems))


@dataclass(frozen=True)
class ClampedSwiGLU:
    """``gate * sigmoid(alpha * gate) * (up + 1)``, the gate clamped from above and up on both sides (gpt-oss,
    https://arxiv.org/abs/2508.10925)."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True)
class Experts:
    """What an expert computes: ``down(activation(gate_up(x)))``."""

    activation: ClampedSwiGLU | None = None
    """None: SwiGLU."""
    bias: bool = False
    """Both of an expert's layers have biases; a token's weight multiplies that of ``down``, too."""
    interleaved: bool = False
    """Rows of ``gate_up`` are those of gate and up in turns, as in checkpoints of gpt-oss; otherwise all of gate, then
    all of up."""


SWIGLU = Experts()
