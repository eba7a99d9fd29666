"""SGLang's process groups inside a torch.distributed world that other code shares.

SGLang assumes that the world is one engine. Here the host owns the world, which is divided into engines of consecutive
ranks, and SGLang builds its groups inside the block of ranks of each engine.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch.distributed as dist
from sglang.srt.distributed import bootstrap, parallel_state
from sglang.srt.managers import tp_worker

_ONE_ENGINE = "if world_size != tensor_model_parallel_size * pipeline_model_parallel_size:"
_WHOLE_ENGINES = "if world_size % (tensor_model_parallel_size * pipeline_model_parallel_size):"


def join(engine_size: int) -> None:
    """Make the next engine constructed in this process one of the ``world size / engine_size`` engines of the world.

    All ranks of the world construct their engines at the same time: every rank takes part in creating every group.
    Raises RuntimeError when torch.distributed is not initialised, ValueError when ``engine_size`` does not divide the
    world's size.
    """
    # Queues in shared memory for pickled objects; nothing here is sent through them.
    os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "false"
    if not dist.is_initialized():
        raise RuntimeError("initialise torch.distributed before building an engine")
    world_size = dist.get_world_size()
    if world_size % engine_size:
        raise ValueError(f"engines of {engine_size} ranks do not divide a world of {world_size} ranks")
    blocks = [list(range(first, first + engine_size)) for first in range(0, world_size, engine_size)]

    def build_engine_group(*, backend: str, local_rank: int, **_: Any) -> None:
        # In place of SGLang's init_distributed_environment, which would initialise torch.distributed a second time
        # and make one group of all ranks. ``group_name`` stays SGLang's.
        parallel_state._WORLD = parallel_state.init_model_parallel_group(
            blocks,
            local_rank,
            backend,
            use_pynccl=False,
            use_custom_allreduce=False,
            use_mscclpp_allreduce=False,
            use_torch_symm_mem_allreduce=False,
            group_name="world",
        )

    bootstrap.init_distributed_environment = build_engine_group
    bootstrap.initialize_model_parallel = _initialize_whole_engines
    # SGLang broadcasts the random seed, with ranks numbered from 0 where torch numbers them in the world, which hangs
    # in every engine but the first. The seed is a constant here, so nothing has to be broadcast.
    tp_worker.broadcast_pyobj = lambda data, *args, **kwargs: data


def leave() -> None:
    """Destroy the groups that SGLang built; the host's groups stay. All ranks of the world call this together."""
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def _without_one_engine_check() -> Any:
    """Return SGLang's ``initialize_model_parallel`` without its check that the world is one engine.

    The function builds groups for every block of the world already: only the check stands in the way of several
    engines. It has no parameter for that, so that one line of its source is replaced and the function compiled again,
    in the namespace of its own module, whose globals it assigns.
    """
    source = inspect.getsource(parallel_state.initialize_model_parallel)
    if source.count(_ONE_ENGINE) != 1:
        raise RuntimeError("sglang's initialize_model_parallel has changed; install the version that doctor names")
    namespace = parallel_state.__dict__
    exec(compile(source.replace(_ONE_ENGINE, _WHOLE_ENGINES), parallel_state.__file__, "exec"), namespace)
    return namespace["initialize_model_parallel"]


_initialize_whole_engines = _without_one_engine_check()
