"""Digests of what a trainer holds: weights, the gradient, the optimizer's state, all in checkpoint coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from miles_spmd.ledger.rectangles import Rectangle, parts
from miles_spmd.ledger.tensor_sums import TensorSums
from miles_spmd.models import TensorLayout
from miles_spmd.training.optimizer import parts as optimizers


class _Share(NamedTuple):
    """The elements [start, stop) of a parameter that this rank updates, and the optimizer's own tensor for them."""

    start: int
    stop: int
    optimizer: MegatronOptimizer
    main: Tensor


class TrainerDigests:
    """Of one trainer. ``weights`` lie as ``layouts`` say; the gradient and the optimizer's state of a parameter are
    wherever the optimizer has put this rank's share of it."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        layouts: Sequence[TensorLayout],
        optimizer: ChainedOptimizer,
    ) -> None:
        self._parameters = parameters
        layout = {own.local_name: own for own in layouts}
        self._weights = TensorSums({name: parts(layout[name], p.shape) for name, p in parameters.items()})
        shares = _shares(parameters.values(), optimizer)
        # the last pipeline stage's copy of tied embeddings is updated like the first stage's
        self._shares = {
            name: shares[p] for name, p in parameters.items() if p in shares and not getattr(p, "shared", False)
        }
        self._updated = TensorSums(
            {name: parts(layout[name], parameters[name].shape, s.start, s.stop) for name, s in self._shares.items()}
        )

    @property
    def of_weights(self) -> list[Rectangle]:
        """What the numbers of :meth:`weights` belong to, in order."""
        return self._weights.rectangles

    @property
    def of_updates(self) -> list[Rectangle]:
        """The same of :meth:`gradient` and :meth:`optimizer_state`."""
        return self._updated.rectangles

    def weights(self) -> Tensor:
        """int64, on the device."""
        return self._weights(self._parameters)

    def gradient(self) -> Tensor:
        """After it was summed over all ranks, before it is clipped: int64, on the device."""
        return self._updated(
            {name: _gradient(self._parameters[name])[s.start : s.stop] for name, s in self._shares.items()}
        )

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """Main parameters and every kind of state that has their shape, by its name: uint64."""
        kinds: dict[str, dict[str, Tensor]] = {"main_params": {}}
        for name, share in self._shares.items():
            kinds["main_params"][name] = share.main
            for kind, value in share.optimizer.optimizer.state[share.main].items():
                if torch.is_tensor(value) and value.dim():
                    kinds.setdefault(kind, {})[name] = value
        return {kind: to_host(self._updated(tensors)) for kind, tensors in kinds.items()}


def to_host(sums: Tensor) -> np.ndarray:
    """uint64; waits for the device."""
    return sums.cpu().numpy().view(np.uint64)


def _gradient(parameter: Any) -> Tensor:
    """Where Megatron adds it up, flat."""
    return parameter.main_grad.view(-1)


def _shares(parameters: Iterable[torch.nn.Parameter], optimizer: ChainedOptimizer) -> dict[torch.nn.Parameter, _Share]:
    shares = {}
    whole: dict[int, MegatronOptimizer] = {}  # optimizers that have all of a parameter, by the tensor that they update
    for inner in optimizers(optimizer):
        if isinstance(inner, DistributedOptimizer):
            for parameter, (group, place) in inner.model_param_group_index_map.items():
                where = inner._get_model_param_range_map(parameter)["param"]
                main = inner.optimizer.param_groups[group]["params"][place]
                shares[parameter] = _Share(where.start, where.end, inner, main)
        else:
            whole |= {id(main): inner for main in inner.get_parameters()}
    for parameter in parameters:
        main = getattr(parameter, "main_param", parameter)
        if id(main) in whole:
            shares[parameter] = _Share(0, parameter.numel(), whole[id(main)], main)
    return shares
