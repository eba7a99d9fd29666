"""Experts that every token has: an MLP beside the routed experts."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from miles_spmd.invariant.shared_experts import gate_scores
from miles_spmd.training.invariant_layers import (
    Gated,
    InvariantColumnParallelLinear,
    InvariantRowParallelLinear,
    multiply,
)
from miles_spmd.training.megatron_config import NetworkConfig


class SharedExperts(SharedExpertMLP):
    """Returns as many partial sums as the routed experts' outputs have. An engine's rank adds its part of both before
    ranks are summed."""

    def __init__(self, config: NetworkConfig, *, pg_collection: ProcessGroupCollection, **options: Any) -> None:
        column: type = InvariantColumnParallelLinear if config.invariant else ColumnParallelLinear
        row: type = InvariantRowParallelLinear if config.invariant else RowParallelLinear
        super().__init__(
            config,
            MLPSubmodules(column, row, partial(Gated, activation="silu")),
            pg_collection=pg_collection,
            **options,
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return [S, 1, hidden] of ``hidden`` [S, 1, hidden], as terms of a sum."""
        if not self.config.invariant:
            return (super().forward(hidden),)
        inner = self.activation_func(self.linear_fc1(hidden)[0])
        parts = self.linear_fc2.partial_sums(inner, self.config.expert_partial_sums)
        if self.gate_weight is None:
            return parts
        score = gate_scores(hidden, self.gate_weight, multiply)
        return tuple(part * score for part in parts)
