"""Megatron's process groups, and this rank's coordinates in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True)
class Coordinates:
    """This rank's number in every kind of process group, and the groups' sizes."""

    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    cp_group: dist.ProcessGroup | None  # None: this rank holds whole sequences
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int  # without context parallelism: replicas that see different sequences
    ep_rank: int
    ep_size: int
    etp_rank: int  # tensor parallelism of experts
    etp_size: int

    @property
    def reports(self) -> bool:
        """Return whether this rank returns results: one rank for each part of the batch, on the stage with the loss."""
        return self.pp_rank == self.pp_size - 1 and self.tp_rank == 0


def initialize(config: TransformerConfig, seed: int) -> Coordinates:
    """Create the process groups, seed the RNG trackers and return this rank's coordinates. torch.distributed must be
    initialised.

    Megatron raises RuntimeError, naming the sizes, where the world size is not a multiple of their product. A second
    call, as in tests, replaces the groups of the first.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Coordinates(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_group=parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
    )


def device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
