"""What the operators of a model put out for one sequence, on either side, and which of them is the first to differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of a layer, in the order in which they run: each is given what came before, of this and earlier tokens.
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
    token: int  # the first, by its place in the sequence
    tokens: int  # that differ, of those compared
    compared: int
    largest: float


Trace = dict[str, dict[int, Tensor]]  # operator -> place in the sequence -> its output, flat, on the host


def operators(layers: int) -> list[str]:
    return [FIRST, *(f"layer {layer}, {part}" for layer in range(layers) for part in PARTS), LAST]


@contextmanager
def hooked(
    modules: dict[str, torch.nn.Module],
    places: Callable[[Tensor], Tensor],
    reshape: dict[str, Callable[[Tensor], Tensor]],
) -> Iterator[Trace]:
    """Record what ``modules``, by operator, put out meanwhile: the first of several outputs, of which ``places`` says
    where in the sequence its rows belong, after the function that ``reshape`` has for a part."""
    found: Trace = {name: {} for name in modules}

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


def first_difference(engine: Trace, trainer: Trace, layers: int, tokens: int) -> Difference | None:
    """Among the first ``tokens`` of the sequence; only operators and tokens that both sides have are compared."""
    for name in operators(layers):
        ours, theirs = trainer.get(name, {}), engine.get(name, {})
        both = [t for t in range(tokens) if t in ours and t in theirs and ours[t].shape == theirs[t].shape]
        gaps = {t: float((ours[t].float() - theirs[t].float()).abs().max()) for t in both}
        if wrong := [t for t, gap in gaps.items() if gap]:
            return Difference(name, wrong[0], len(wrong), len(both), max(gaps.values()))
    return None
