"""Resumable checkpoints of a trainer: what a rank holds of them, in coordinates of the model's checkpoint tensors.

A checkpoint may be read under another layout: tensor, expert, pipeline, context and data parallelism, virtual stages,
the kind of layers and a distributed optimizer may change. What may not change is listed in ``_FIXED``; the error for it
names both values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from miles_spmd.ledger import rectangles
from miles_spmd.models import Family, TensorLayout
from miles_spmd.models.blocks.experts import is_trained
from miles_spmd.training.offload import Offload
from miles_spmd.training.optimizer import inner_optimizers, shares
from miles_spmd.weights.sharded_files import Reader, Share

FORMAT = 4
READERS = 4  # threads that read and verify
WEIGHTS, RANDOM = "weights", "random"
# settings that must be those of the checkpoint
_FIXED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "vocab_size",
    "params_dtype",
    "optimizer",  # others have other states
)
# of the random state, which belongs to a rank of a layout
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


class TrainerCheckpointError(ValueError):
    """A folder that a trainer's checkpoint cannot be read from, with the reason."""


class Held(NamedTuple):
    """A share of a checkpoint in this rank's memory."""

    share: Share
    stays: bool  # in host memory that nothing overwrites before the share is written; else it has to be copied


class Content(NamedTuple):
    """What this rank holds of one model. A share that several ranks hold is written by one of them."""

    held: list[Held]
    notes: dict[str, Any]


class TrainerCheckpoint:
    """What a checkpoint has of one trainer: weights (fp32, also where the model computes with less, as the optimizer
    has them), the optimizer's state, the number of updates and the random state."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        layouts: Sequence[TensorLayout],
        family: Family,
        config: Any,  # Megatron's TransformerConfig
        optimizer: ChainedOptimizer,
        schedule: OptimizerParamScheduler,
        offload: Offload,
    ) -> None:
        self._parameters, self._family, self._schedule, self._offload = parameters, family, schedule, offload
        self._layouts = {own.local_name: own for own in layouts}
        self._shapes = {name: _matrix(shape) for name, shape in family.checkpoint_tensors().items()}
        self._optimizer, self._shares = optimizer, shares(parameters.values(), optimizer)
        kinds = {type(inner.optimizer).__name__ for inner in inner_optimizers(optimizer)}
        self._settings = {name: getattr(config, name, None) for name in _FIXED} | {
            "vocab_size": family.vocab_size,
            "params_dtype": str(config.params_dtype),
            "optimizer": ", ".join(sorted(kinds)),
        }
        self._layout = [dist.get_world_size(), *(getattr(config, name) for name in _LAYOUT)]

    def content(self) -> Content:
        """Return what this rank holds; the tensors are the trainer's own."""
        held, kinds = list[Held](), set[str]()
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                held += [Held(share, stays=False) for share in self._parts(WEIGHTS, name, parameter.data)]
                continue
            # the last pipeline stage's copy of tied embeddings is updated like the first stage's
            if parameter not in self._shares or getattr(parameter, "shared", False):
                continue
            own = self._shares[parameter]
            kinds |= own.state.keys()
            for kind, tensor in {WEIGHTS: own.main, **own.state}.items():
                memory = self._offload.on_host(tensor)
                parts = self._parts(kind, name, memory, own.start, own.stop)
                held += [Held(share, stays=memory is not tensor) for share in parts]
        held += [Held(share, stays=True) for share in self._random().values()]
        notes = {"updates": self._schedule.num_steps, "kinds": sorted(kinds), "layout": self._layout}
        return Content(held, self._notes() | notes)

    def content_of(self, weights: Mapping[str, Tensor]) -> Content:
        """Return what this rank holds of other ``weights`` of this network, in host memory, by their local names."""
        of_all = (share for name, tensor in weights.items() for share in self._parts(WEIGHTS, name, tensor))
        return Content([Held(share, stays=True) for share in of_all], self._notes())

    def load(self, path: str | Path, digests: Sequence[str] = ()) -> None:
        """Continue from what was saved in ``path``; all that is read is compared with ``digests``, if they are given.

        The learning rate and its schedule are the configuration's, at the checkpoint's number of updates. Random state
        is restored where the layout is the same. Raises TrainerCheckpointError where the folder does not hold a
        checkpoint, is damaged or belongs to another model; the trainer's state is then undefined until another one was
        loaded. Ranks do not wait for each other.
        """
        with self._open(path, digests) as reader:
            kinds = reader.notes["kinds"]
            self._check_tensors(reader, [WEIGHTS, *kinds])
            targets = list(self._targets(kinds))
            same_ranks = reader.notes["layout"] == self._layout
            random = {name: own for name, own in self._random().items() if same_ranks and reader.has(own)}
            _read(reader, [*targets, *random.values()])
            updates = reader.notes["updates"]
            for own in self._shares.values():
                state = own.optimizer.optimizer.state[own.main]
                if "exp_avg" in state:  # a tensor for each: an update increments it in place
                    state["step"] = torch.full((), updates, dtype=torch.float32, device=own.main.device)
            self._schedule.step(updates - self._schedule.num_steps)
            set_random_state({name: share.values[0] for name, share in random.items()})

    def load_weights(self, path: str | Path, into: Mapping[str, Tensor], digests: Sequence[str] = ()) -> None:
        """Read the weights in ``path``, of :meth:`content` or :meth:`content_of`, ``into`` tensors of this network by
        their local names. Errors as in :meth:`load`."""
        with self._open(path, digests) as reader:
            self._check_tensors(reader, [WEIGHTS, *reader.notes.get("kinds", [])])
            _read(reader, [share for name, tensor in into.items() for share in self._parts(WEIGHTS, name, tensor)])

    # --- of another rank that has the same place ---------------------------------------------------------------------

    def live_tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of which the state consists, in an order that the ranks of one layout share. Some may be
        parts of others."""
        for parameter in self._parameters.values():
            yield parameter.data
            if (own := self._shares.get(parameter)) is not None:
                yield own.main
                state = own.optimizer.optimizer.state[own.main]
                yield from (state[name] for name in sorted(state) if isinstance(state[name], Tensor))

    @property
    def updates(self) -> int:
        """The number of updates that were made."""
        return int(self._schedule.num_steps)

    def random_state(self) -> dict[str, Tensor]:
        """Return the random state of this rank, uint8, by name."""
        return {name: share.values[0] for name, share in self._random().items()}

    def proceed(self, updates: int) -> None:
        """Continue from tensors that were put in place, those after so many updates."""
        self._schedule.step(updates - self._schedule.num_steps)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _notes(self) -> dict[str, Any]:
        return {"format": FORMAT, "settings": self._settings}

    def _targets(self, kinds: Iterable[str]) -> Iterator[Share]:
        """Yield everything that is to be loaded. Elements that no checkpoint has (added rows of a vocabulary) are and
        stay zero."""
        for name, parameter in self._parameters.items():
            yield from self._parts(WEIGHTS, name, parameter.data)
            if (own := self._shares.get(parameter)) is None:
                continue
            if parameter.dtype != own.main.dtype:  # else they are the parameter itself
                yield from self._parts(WEIGHTS, name, own.main, own.start, own.stop)
            for kind in kinds:
                state = own.optimizer.optimizer.state[own.main]
                moments = state.setdefault(kind, torch.zeros_like(own.main))
                yield from self._parts(kind, name, moments, own.start, own.stop)

    def _parts(self, kind: str, name: str, tensor: Tensor, start: int = 0, stop: int | None = None) -> Iterator[Share]:
        """Yield the shares that ``tensor`` consists of, the elements [start, stop) of the parameter ``name``."""
        flat, shape = tensor.detach().view(-1), self._parameters[name].shape
        for place, offset, stride in rectangles.parts(self._layouts[name], shape, start, stop):
            size = place.rows, place.columns
            values = flat.as_strided(size, (stride, 1), flat.storage_offset() + offset)
            yield Share(f"{kind}.{place.name}", self._shapes[place.name], place.row, place.column, values)

    def _random(self) -> dict[str, Share]:
        """Return the random state of this rank, by name: each is a row of a matrix [ranks, bytes]."""
        states = {"cpu": torch.get_rng_state()}
        states |= {f"tracker.{n}": state for n, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        ranks, rank = dist.get_world_size(), dist.get_rank()
        return {
            name: Share(f"{RANDOM}.{name}", (ranks, state.numel()), rank, 0, state[None])
            for name, state in states.items()
        }

    @contextmanager
    def _open(self, path: str | Path, digests: Sequence[str]) -> Iterator[Reader]:
        """Provide the reader of a checkpoint of this model. Whatever fails meanwhile is raised as one error."""
        if not Path(path).is_dir():
            raise TrainerCheckpointError(f"checkpoint {path} does not exist")
        try:
            reader, own = Reader(Path(path), digests), self._settings
            if reader.notes.get("format") != FORMAT:
                raise ValueError(f"its format is {reader.notes.get('format')}, this version reads {FORMAT}")
            saved = reader.notes["settings"]
            different = [f"{name} was {saved[name]}, now {own[name]}" for name in _FIXED if saved[name] != own[name]]
            if different:
                raise ValueError("; ".join(different))
            yield reader
        except Exception as error:
            raise TrainerCheckpointError(f"checkpoint {path} cannot be loaded: {error}") from error

    def _check_tensors(self, reader: Reader, kinds: Iterable[str]) -> None:
        expected = {f"{kind}.{name}" for kind in kinds for name in self._shapes if kind == WEIGHTS or is_trained(name)}
        found = {key for key in reader.keys if not key.startswith(f"{RANDOM}.")}
        if absent := expected - found:
            raise ValueError(f"{len(absent)} tensors are missing from it, such as {min(absent)}")
        if unread := found - expected:
            raise ValueError(f"it has {len(unread)} tensors that this model does not have, such as {min(unread)}")


def _read(reader: Reader, targets: Sequence[Share]) -> None:
    with ThreadPoolExecutor(READERS) as threads:
        for _ in threads.map(reader.read, targets):
            pass


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    rows, columns = (1, *shape)[-2:]
    return rows, columns


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Set what :meth:`TrainerCheckpoint.random_state` returns of this process, or a part of it."""
    trackers = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    if trackers:
        tensor_parallel.get_cuda_rng_tracker().set_states(trackers)
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
