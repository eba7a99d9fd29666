"""Where a user's own function can stand: one Protocol per plug point, and how a setting's name becomes a function.

A setting names a built-in, or anybody's function as ``module:function``. Importing this file imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from miles_spmd.algorithms.rollout_batch import Arrays, Correction, Estimate, RolloutBatch
from miles_spmd.config.schema import Algorithm
from miles_spmd.data.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from miles_spmd.algorithms.token_batch import TokenBatch

Function = TypeVar("Function", bound=Callable[..., Any])


class PlugPointError(ValueError):
    """A name that is neither a built-in nor an importable function: which setting, which name, what is known."""


@dataclass(frozen=True)
class PlugPoint(Generic[Function]):
    """The built-in functions of one setting of ``[algorithm]`` by name."""

    setting: str
    builtins: Mapping[str, Function]

    def resolve(self, name: str) -> Function:
        """The function called ``name``. Raises PlugPointError."""
        if name in self.builtins:
            return self.builtins[name]
        where = f"algorithm.{self.setting} = {name!r}"
        module, _, path = name.partition(":")
        if not module or not path:
            known = ", ".join([*self.builtins, "or anybody's `module:function`"])
            raise PlugPointError(f"{where} is unknown; known: {known}")
        try:
            target: Any = importlib.import_module(module)
            for part in path.split("."):
                target = getattr(target, part)
        except Exception as error:
            raise PlugPointError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
        if not callable(target):
            raise PlugPointError(f"{where} is a {type(target).__name__}, not a function")
        return target


# --- on the controller, on plain arrays of the whole batch -----------------------------------------------------------


class RewardPostProcess(Protocol):
    """``algorithm.reward_post_process``: rewards as the advantages see them, from those that the samples were given."""

    def __call__(self, samples: Sequence[Sample], rewards: np.ndarray) -> np.ndarray:
        """``rewards`` and the result are float64 [N], in the order of ``samples``; not finite is an error."""
        ...


class GroupFilter(Protocol):
    """``algorithm.dynamic_sampling_filter``: whether a prompt's scored samples are worth training on."""

    def __call__(self, samples: Sequence[Sample]) -> bool: ...


class AdvantageEstimator(Protocol):
    """``algorithm.advantage_estimator``: an advantage for every trained token of the rollout."""

    def __call__(self, batch: RolloutBatch, algorithm: Algorithm) -> Estimate: ...


class CorrectionFunction(Protocol):
    """``algorithm.tis_function``: weights of the policy term that make up for the engine having sampled with other
    probabilities than the trainer computes."""

    def __call__(self, batch: RolloutBatch, algorithm: Algorithm) -> Correction: ...


class Aggregation(Protocol):
    """``algorithm.loss_aggregation``: how per-token losses of one optimizer step become one number."""

    def __call__(self, masks: Arrays, rollout_ids: np.ndarray, max_response_len: int) -> Arrays:
        """A weight for every token, shaped like the 0/1 ``masks`` and 0 where they are; ``rollout_ids`` is int [N].
        The step's loss is the sum over all tokens of weight x per-token loss."""
        ...


# --- in the trainer, on the tokens of one packed micro-batch ---------------------------------------------------------


class Surrogate(Protocol):
    """``algorithm.loss_type``: the policy term of the loss. KL, entropy and correction weights are added around it."""

    def __call__(self, log_probs: Tensor, tokens: TokenBatch, algorithm: Algorithm) -> tuple[Tensor, Tensor]:
        """Loss of each token, fp32 [T], differentiable in ``log_probs`` [T]; and whether it was clipped, bool [T]."""
        ...
