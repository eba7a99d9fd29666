"""Resumable checkpoints of the trainer, by Megatron's distributed checkpointing: each rank writes what it holds.

A checkpoint may be read under another layout: tensor, expert, pipeline, context and data parallelism and virtual
stages may change. What may not change is listed in ``_FIXED``; the error for it names both values.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from miles_spmd.training.model import unwrap

_FORMAT = 2
# settings that must be those of the checkpoint: the model's shape, and what Megatron cannot convert
_FIXED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "vocab_size",  # Megatron would cut or pad embeddings silently
    "params_dtype",
    "transformer_impl",  # norms have other names
    "use_distributed_optimizer",  # the two kinds of optimizer have different state
)
_RANDOM_STATE_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")

_RANDOM = "random"
_COMMON_FILE = "common.pt"
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class TrainerCheckpointError(ValueError):
    """A folder that a trainer's checkpoint cannot be read from or written to, with the reason."""


class TrainerCheckpoint:
    """What a checkpoint has of one trainer. All ranks call each method."""

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer, schedule: OptimizerParamScheduler
    ) -> None:
        # with the names that Megatron's optimizers expect in a state dict
        self._chunks = {"model" if len(chunks) == 1 else f"model{i}": chunk for i, chunk in enumerate(chunks)}
        self._optimizer, self._schedule = optimizer, schedule
        config, ddp = chunks[0].config, chunks[0].ddp_config
        self._settings = {name: getattr(config, name, None) for name in (*_FIXED, *_RANDOM_STATE_LAYOUT)} | {
            "vocab_size": unwrap(chunks[0]).real_vocab_size,
            "params_dtype": str(config.params_dtype),
            "use_distributed_optimizer": ddp.use_distributed_optimizer,
        }

    def save(self, path: str | Path) -> None:
        """Write weights, optimizer, schedule and random state into ``path``, which must be empty or new.

        Raises TrainerCheckpointError where the folder is not empty.
        """
        state = self._weights_and_optimizer(is_loading=False)
        self._write(path, state | {"updates": self._schedule.num_steps, _RANDOM: _random_state()})

    def save_weights(self, path: str | Path) -> None:
        """Write the weights alone, as :meth:`save` does."""
        self._write(path, self._weights())

    def load(self, path: str | Path) -> None:
        """Continue from what :meth:`save` wrote.

        The learning rate and its schedule are the configuration's, at the checkpoint's number of updates. Random state
        is restored where tensor and pipeline parallelism are the same. Raises TrainerCheckpointError on every rank
        where the folder does not hold a checkpoint, is damaged or belongs to another model; the weights are then
        undefined.
        """
        with _one_error(path):
            saved = self._checked_settings(path)
            # random state is one per tensor- and pipeline-parallel rank, and other ranks have no state to restore
            same_ranks = all(saved[name] == self._settings[name] for name in _RANDOM_STATE_LAYOUT)
            state = self._weights_and_optimizer(is_loading=True)
            if same_ranks:
                state[_RANDOM] = _random_state()
            loaded = self._read(path, state)
            _load_optimizer(self._optimizer, loaded["optimizer"])
            self._schedule.step(loaded["updates"] - self._schedule.num_steps)
            if same_ranks:
                _set_random_state(loaded[_RANDOM])

    def load_weights(self, path: str | Path) -> None:
        """Replace the weights by what :meth:`save_weights` wrote; the optimizer's main parameters stay as they are.
        Errors as in :meth:`load`."""
        with _one_error(path):
            self._checked_settings(path)
            self._read(path, self._weights())

    def _weights(self) -> dict[str, Any]:
        return {name: chunk.module.sharded_state_dict() for name, chunk in self._chunks.items()}

    def _weights_and_optimizer(self, is_loading: bool) -> dict[str, Any]:
        state = self._weights()
        optimizer = self._optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
        return state | {"optimizer": optimizer}

    def _write(self, path: str | Path, state: dict[str, Any]) -> None:
        folder = Path(path)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        if any(folder.iterdir()):
            raise TrainerCheckpointError(f"{folder} is not empty: a checkpoint is written into a folder of its own")
        dist.barrier()  # before any rank writes, all have looked
        state |= {"format": _FORMAT, "settings": self._settings}
        dist_checkpointing.save(state, str(folder), _SynchronousSave("torch_dist", 1))

    def _read(self, path: str | Path, state: dict[str, Any]) -> dict[str, Any]:
        """Load what ``state`` describes, put the weights into the model, and return all of it."""
        loaded, unread, absent = dist_checkpointing.load(state, str(path), strict=StrictHandling.RETURN_ALL)
        unread = {key for key in unread if not key.startswith(_RANDOM)}
        if absent:
            raise ValueError(f"{len(absent)} tensors are missing from it, such as {min(absent)}")
        if unread:
            raise ValueError(f"it has {len(unread)} tensors that this model does not have, such as {min(unread)}")
        for name, chunk in self._chunks.items():
            chunk.module.load_state_dict(loaded[name])
        return loaded

    def _checked_settings(self, path: str | Path) -> dict[str, Any]:
        """Return the checkpoint's settings. Raises ValueError where they do not fit this model's."""
        common, own = _common_state(str(path)), self._settings
        if common.get("format") != _FORMAT:
            raise ValueError(f"its format is {common.get('format')}, this version reads {_FORMAT}")
        saved = common["settings"]
        different = [f"{name} was {saved[name]}, now {own[name]}" for name in _FIXED if saved[name] != own[name]]
        if different:
            raise ValueError("; ".join(different))
        return saved


class _SynchronousSave(TorchDistSaveShardedStrategy):
    """Writes Megatron's format in this process.

    Megatron's own strategy forks child processes to write, even when it waits for them. This process has threads of an
    engine and of sockets, which a fork does not survive.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


@contextmanager
def _one_error(folder: str | Path) -> Iterator[None]:
    """Raise whatever fails below, in Megatron, torch or a file, as one error that names the checkpoint."""
    if not Path(folder).is_dir():
        raise TrainerCheckpointError(f"checkpoint {folder} does not exist")
    try:
        yield
    except (Exception, CheckpointException) as error:  # torch's is a BaseException only
        raise TrainerCheckpointError(
            f"checkpoint {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _common_state(folder: str) -> dict[str, Any]:
    """Return what is the same on all ranks. The file is checked here: Megatron's own errors do not name it."""
    if dist_checkpointing.check_is_distributed_checkpoint(folder) and not Path(folder, _COMMON_FILE).is_file():
        raise ValueError(f"{_COMMON_FILE} is missing")
    try:
        return dist_checkpointing.load_common_state_dict(folder)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{_COMMON_FILE} is damaged: {error}") from error


def _load_optimizer(optimizer: ChainedOptimizer, state: dict[Any, Any]) -> None:
    """Load moments and main parameters; options (learning rate, betas) stay the configuration's."""
    many = len(optimizer.chained_optimizers) > 1
    for index, inner in enumerate(optimizer.chained_optimizers):
        if inner.is_stub_optimizer:
            continue
        options = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in inner.param_groups]
        own = state[index] if many else state
        parameter_state = own.pop("param_state", None)
        if isinstance(inner.optimizer, torch.optim.Adam) and not isinstance(inner, DistributedOptimizer):
            # Megatron leaves the step out of a checkpoint at step 0, and requires it when it loads one.
            own.get("optimizer", own)["state"].setdefault("common_step", torch.zeros(()))
        inner.load_state_dict(own)
        if isinstance(inner, DistributedOptimizer):
            _load_parameter_state(inner, parameter_state)
        for group, own_options in zip(inner.param_groups, options):
            group.update(own_options)


def _load_parameter_state(optimizer: DistributedOptimizer, state: dict[int, dict[str, torch.Tensor]]) -> None:
    """Load a distributed optimizer's moments and main parameters.

    Megatron copies every tensor of a parameter's own state from ``state``. torch's Adam, unlike Transformer Engine's,
    also has the step there, which was loaded before and is not in ``state``: it is taken out meanwhile.
    """
    steps = [(own, own.pop("step")) for own in optimizer.optimizer.state.values() if "step" in own]
    optimizer.load_parameter_state_from_fully_reshardable(state)
    for own, step in steps:
        own["step"] = step.clone()  # Megatron gave all the same tensor, which every update would increment in place


def _random_state() -> ShardedObject:
    """Describe the random state of this tensor- and pipeline-parallel rank; its data-parallel group has the same."""
    state = {"cpu": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    stages, parts = parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject(
        _RANDOM, state, (stages.size(), parts.size()), (stages.rank(), parts.rank()), replica_id=replica
    )


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
