"""Megatron's process groups, and this rank's coordinates in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig

# the settings of Megatron that make process groups
_SIZES = (
    *(f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "virtual_pipeline", "expert")),
    "context_parallel_size",
    "expert_tensor_parallel_size",
)


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
    waits_with: int  # ranks with one number wait for each other in every layer: of one replica, or of its experts

    @property
    def reports(self) -> bool:
        """Return whether this rank returns results: one rank for each part of the batch, on the stage with the loss."""
        return self.pp_rank == self.pp_size - 1 and self.tp_rank == 0

    @property
    def of_weights(self) -> dict[str, int]:
        """Return the coordinates that decide which part of a layer's weights this rank has, by name."""
        return {name: getattr(self, name) for kind in ("tp", "etp", "ep") for name in (f"{kind}_rank", f"{kind}_size")}


def initialize(config: TransformerConfig, seed: int) -> Coordinates:
    """Create the process groups, seed the RNG trackers and return this rank's coordinates. torch.distributed must be
    initialised.

    Megatron raises RuntimeError, naming the sizes, where the world size is not a multiple of their product. A second
    call, as in tests, replaces the groups of the first.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**{name: getattr(config, name) for name in _SIZES})
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    context = parallel_state.get_context_parallel_group()
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "cp": context,
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "etp": parallel_state.get_expert_tensor_parallel_group(),
    }
    ranks = {f"{kind}_rank": group.rank() for kind, group in groups.items()}
    sizes = {f"{kind}_size": group.size() for kind, group in groups.items()}
    # Experts may be spread over several replicas, which then wait for each other.
    replicas, copies = sizes["dp_size"], parallel_state.get_expert_data_parallel_world_size()
    waits_with = ranks["dp_rank"] if replicas <= copies else parallel_state.get_expert_data_parallel_rank()
    return Coordinates(**ranks, **sizes, cp_group=context if context.size() > 1 else None, waits_with=waits_with)


def device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
