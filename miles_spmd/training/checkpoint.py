"""Resumable checkpoints of a trainer: each rank writes what it holds of the tensors that Megatron describes.

A checkpoint may be read under another layout: tensor, expert, pipeline, context and data parallelism and virtual
stages may change. What may not change is listed in ``_FIXED``; the error for it names both values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from miles_spmd.training.model import unwrap
from miles_spmd.training.sharded_files import DamagedError, Reader, write

_FORMAT = 3
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
    "vocab_size",  # embeddings would be cut or padded silently
    "params_dtype",
    "transformer_impl",  # norms have other names
    "use_distributed_optimizer",  # the two kinds of optimizer have different state
)
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class TrainerCheckpointError(ValueError):
    """A folder that a trainer's checkpoint cannot be read from or written to, with the reason."""


class DamagedCheckpointError(TrainerCheckpointError):
    """A checkpoint that has a file which is missing or is not what was written."""


class TrainerCheckpoint:
    """What a checkpoint has of one trainer. All ranks call each method."""

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer, schedule: OptimizerParamScheduler
    ) -> None:
        # with the names that Megatron's optimizers expect in a state dict
        self._chunks = {"model" if len(chunks) == 1 else f"model{i}": chunk for i, chunk in enumerate(chunks)}
        self._optimizer, self._schedule = optimizer, schedule
        config, ddp = chunks[0].config, chunks[0].ddp_config
        self._settings = {name: getattr(config, name, None) for name in _FIXED} | {
            "vocab_size": unwrap(chunks[0]).real_vocab_size,
            "params_dtype": str(config.params_dtype),
            "use_distributed_optimizer": ddp.use_distributed_optimizer,
        }

    def save(self, path: str | Path) -> str:
        """Write weights, optimizer, number of updates and random state into ``path``, which must be empty or new.
        Return the digest that :meth:`load` compares; "" on all ranks but the first.

        Raises TrainerCheckpointError where the folder is not empty, or cannot be written.
        """
        state = self._weights_and_optimizer(is_loading=False) | {"random": _random_state()}
        return self._write(path, state, {"updates": self._schedule.num_steps})

    def save_weights(self, path: str | Path) -> str:
        """Write the weights alone, as :meth:`save` does."""
        return self._write(path, self._weights(), {})

    def load(self, path: str | Path, digest: str = "") -> None:
        """Continue from what :meth:`save` wrote; all that is read is compared with ``digest``, if it is given.

        The learning rate and its schedule are the configuration's, at the checkpoint's number of updates. Random state
        is restored where tensor and pipeline parallelism are the same. Raises TrainerCheckpointError where the folder
        does not hold a checkpoint, is damaged or belongs to another model; the weights are then undefined.
        """
        with self._open(path, digest) as reader:
            # one for each tensor- and pipeline-parallel rank: under another layout there is none of that shape
            random = {name: tensor for name, tensor in _random_state().items() if reader.has(tensor)}
            loaded = self._read(reader, self._weights_and_optimizer(is_loading=True) | {"random": random})
            updates = reader.notes["updates"]
            _load_optimizer(self._optimizer, loaded["optimizer"], updates)
            self._schedule.step(updates - self._schedule.num_steps)
            _set_random_state(loaded.get("random", {}))

    def load_weights(self, path: str | Path, digest: str = "") -> None:
        """Replace the weights by what :meth:`save_weights` wrote; the optimizer's main parameters stay as they are.
        Errors as in :meth:`load`."""
        with self._open(path, digest) as reader:
            self._read(reader, self._weights())

    def _weights(self) -> dict[str, Any]:
        return {name: chunk.module.sharded_state_dict() for name, chunk in self._chunks.items()}

    def _weights_and_optimizer(self, is_loading: bool) -> dict[str, Any]:
        state = self._weights()
        optimizer = self._optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
        return state | {"optimizer": optimizer}

    def _write(self, path: str | Path, state: dict[str, Any], notes: dict[str, Any]) -> str:
        # the rest of ``state``, such as the options of parameter groups, is the configuration's when it is loaded
        sharded, _ = save_preprocess(state)
        tensors = (value for value in nested_values(sharded) if isinstance(value, ShardedTensor))
        try:
            return write(Path(path), tensors, {"format": _FORMAT, "settings": self._settings} | notes)
        except FileExistsError as error:
            raise TrainerCheckpointError(
                f"{path} is not empty: a checkpoint is written into a folder of its own"
            ) from error
        except OSError as error:
            raise TrainerCheckpointError(
                f"checkpoint {path} cannot be written: {error}; earlier ones are not affected: make room and continue "
                "with checkpoint.resume=true"
            ) from error

    @contextmanager
    def _open(self, path: str | Path, digest: str) -> Iterator[Reader]:
        """Provide the reader of a checkpoint of this model. Whatever fails meanwhile is raised as one error."""
        if not Path(path).is_dir():
            raise TrainerCheckpointError(f"checkpoint {path} does not exist")
        try:
            reader, own = Reader(Path(path), digest), self._settings
            if reader.notes.get("format") != _FORMAT:
                raise ValueError(f"its format is {reader.notes.get('format')}, this version reads {_FORMAT}")
            saved = reader.notes["settings"]
            different = [f"{name} was {saved[name]}, now {own[name]}" for name in _FIXED if saved[name] != own[name]]
            if different:
                raise ValueError("; ".join(different))
            yield reader
        except DamagedError as error:
            raise DamagedCheckpointError(f"checkpoint {path} cannot be loaded: {error}") from error
        except Exception as error:
            raise TrainerCheckpointError(f"checkpoint {path} cannot be loaded: {error}") from error

    def _read(self, reader: Reader, state: dict[str, Any]) -> dict[str, Any]:
        """Load what ``state`` describes, put the weights into the model, and return all of it."""
        state, local, factories = load_preprocess(state)
        sharded, rest = extract_matching_values(state, lambda value: isinstance(value, ShardedTensor))
        wanted: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(wanted, {tensor.key for tensor in nested_values(sharded)})
        absent = set().union(*wanted) - reader.keys
        unread = {key for key in reader.keys.difference(*wanted) if not key.startswith("random.")}
        if absent:
            raise ValueError(f"{len(absent)} tensors are missing from it, such as {min(absent)}")
        if unread:
            raise ValueError(f"it has {len(unread)} tensors that this model does not have, such as {min(unread)}")
        loaded = merge(merge(rest, local), dict_list_map_outplace(reader.read, sharded))
        loaded = apply_factory_merges(loaded, factories)
        for name, chunk in self._chunks.items():
            # not strict: Transformer Engine's modules describe state of FP8 recipes that keep none
            chunk.module.load_state_dict(loaded[name], strict=False)
        return loaded


def _load_optimizer(optimizer: ChainedOptimizer, state: dict[Any, Any], updates: int) -> None:
    """Complete the state after so many updates. Moments and main parameters were read in place, except for those of a
    distributed optimizer, which takes its ranges of whole ones. Options such as betas stay the configuration's."""
    many = len(optimizer.chained_optimizers) > 1
    for index, inner in enumerate(optimizer.chained_optimizers):
        if inner.is_stub_optimizer:
            continue
        for values in inner.optimizer.state.values():
            values.pop("step", None)  # Megatron takes everything else that is there from the checkpoint
        if isinstance(inner, DistributedOptimizer):
            own = state[index] if many else state
            inner.load_parameter_state_from_fully_reshardable(own["param_state"])
        for parameter, values in inner.optimizer.state.items():
            if "exp_avg" in values:  # a tensor for each: an update increments it in place
                values["step"] = torch.full((), updates, dtype=torch.float32, device=parameter.device)


def _random_state() -> dict[str, ShardedTensor]:
    """Describe the random state of this tensor- and pipeline-parallel rank, by name; its data-parallel group has the
    same. Each is a row of a tensor [stages, parts of a layer, bytes]."""
    states = {"cpu": torch.get_rng_state()}
    states |= {f"tracker.{n}": state for n, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    groups = parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    places = [(axis, group.rank(), group.size()) for axis, group in enumerate(groups)]
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return {
        name: ShardedTensor.from_rank_offsets(
            f"random.{name}", state, *places, replica_id=replica, prepend_axis_num=len(places)
        )
        for name, state in states.items()
    }


def _set_random_state(states: dict[str, Tensor]) -> None:
    trackers = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    if trackers:
        tensor_parallel.get_cuda_rng_tracker().set_states(trackers)
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
