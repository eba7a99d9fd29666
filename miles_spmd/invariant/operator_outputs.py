"""The outputs of a model's operators for one sequence, in the engine and in the trainer, and the first that differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The operators of a layer in the order in which they run: each reads the outputs of those before, of this and earlier
# tokens. The first that differs is therefore where the difference begins.
PARTS = (
    "input norm",
    "query, key and value",
    "query norm",
    "key norm",
    "attention",
    "output projection",
    "MLP norm",
    "gate and up projection",
    "SwiGLU",
    "down projection",
    "router",
    "experts",
)
FIRST, LAST = "embedding", "final norm"


class Difference(NamedTuple):
    operator: str
    token: int  # place in the sequence of the first token that differs
    tokens: int  # number of tokens that differ
    compared: int  # number of tokens compared
    largest: float  # max abs diff


OperatorOutputs = dict[str, dict[int, Tensor]]  # operator -> place in the sequence -> its output, flat, on the host


def operators(layers: int) -> list[str]:
    """Return the names of all operators of a model of ``layers`` layers, in the order in which they run."""
    return [FIRST, *(f"layer {layer}, {part}" for layer in range(layers) for part in PARTS), LAST]


@contextmanager
def hooked(
    modules: dict[str, torch.nn.Module],
    places: Callable[[Tensor], Tensor],
    reshape: dict[str, Callable[[Tensor], Tensor]],
) -> Iterator[OperatorOutputs]:
    """Record the outputs of ``modules``, by operator, within the context; of several outputs the first.

    ``places`` returns the places in the sequence of an output's rows, int [rows], or none to leave it out. ``reshape``
    has functions from rows to rows for parts whose output the two sides arrange differently.
    """
    found: OperatorOutputs = {name: {} for name in modules}

    def record(name: str) -> Callable[..., None]:
        function = reshape.get(name.split(", ", 1)[-1], lambda rows: rows)

        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple) else output
            where = places(rows).tolist()
            if where:
                found[name] |= dict(zip(where, function(rows.detach().reshape(len(where), -1)).cpu()))

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(record(name)).remove)
        yield found


def first_difference(engine: OperatorOutputs, trainer: OperatorOutputs, layers: int, tokens: int) -> Difference | None:
    """Return the first operator whose outputs differ among the first ``tokens`` of the sequence, or None.

    Only operators and tokens that both sides have are compared.
    """
    for name in operators(layers):
        ours, theirs = trainer.get(name, {}), engine.get(name, {})
        both = [t for t in range(tokens) if t in ours and t in theirs and ours[t].shape == theirs[t].shape]
        gaps = {t: float((ours[t].float() - theirs[t].float()).abs().max()) for t in both}
        if different := [t for t, gap in gaps.items() if gap]:
            return Difference(name, different[0], len(different), len(both), max(gaps.values()))
    return None
