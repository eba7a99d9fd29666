"""Digests of a trainer's weights, gradient and optimizer state, all in coordinates of the checkpoint's tensors, so that
they can be compared between layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from miles_spmd.ledger.rectangles import parts
from miles_spmd.ledger.tensor_sums import TensorSums
from miles_spmd.models import TensorLayout
from miles_spmd.training.optimizer import shares


class TrainerDigests:
    """The digests of one trainer.

    Weights lie as ``layouts`` describe. Of a parameter's gradient and optimizer state this rank has a share, as the
    optimizer divides them.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], layouts: Sequence[TensorLayout], optimizer: ChainedOptimizer
    ) -> None:
        self._parameters = parameters
        layout = {own.local_name: own for own in layouts}
        self._weights = TensorSums({name: parts(layout[name], p.shape) for name, p in parameters.items()})
        own = shares(parameters.values(), optimizer)
        # the last pipeline stage's copy of tied embeddings is updated like the first stage's
        self._shares = {name: own[p] for name, p in parameters.items() if p in own and not getattr(p, "shared", False)}
        self._updated = TensorSums(
            {name: parts(layout[name], parameters[name].shape, s.start, s.stop) for name, s in self._shares.items()}
        )
        # the parts of tensors that the numbers of :meth:`weights`, and of the other methods, belong to, in order
        self.of_weights, self.of_updates = self._weights.rectangles, self._updated.rectangles

    def weights(self) -> Tensor:
        """Return a digest of every part of the weights, int64, on the device."""
        return self._weights(self._parameters)

    def gradient(self) -> Tensor:
        """Return a digest of every part of the gradient, int64, on the device.

        To be called after the gradient was summed over all ranks and before it is clipped.
        """
        buffers = {name: self._parameters[name].main_grad.view(-1) for name in self._shares}  # type: ignore[attr-defined]
        return self._updated({name: buffers[name][share.start : share.stop] for name, share in self._shares.items()})

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """Return digests of the main parameters and of every kind of state that has their shape, uint64, by kind."""
        kinds: dict[str, dict[str, Tensor]] = {"main_params": {}}
        for name, share in self._shares.items():
            kinds["main_params"][name] = share.main
            for kind, value in share.state.items():
                kinds.setdefault(kind, {})[name] = value
        return {kind: to_host(self._updated(tensors)) for kind, tensors in kinds.items()}


def to_host(sums: Tensor) -> np.ndarray:
    """Return digests as uint64 on the host. Waits for the device."""
    return sums.cpu().numpy().view(np.uint64)
