"""One request, run in the engine and then in the trainer: the first operator whose outputs differ."""

from __future__ import annotations

from miles_spmd.generation.engine import Engine
from miles_spmd.invariant.operator_outputs import first_difference, operators
from miles_spmd.protocol.commands import Bisect
from miles_spmd.protocol.results import Bisection
from miles_spmd.training.network import Network


def bisect(command: Bisect, engine: Engine, network: Network) -> Bisection:
    """Compare on every rank, each in its own part of the model. The engine has weights and runs without CUDA graphs,
    which would hide its operators.

    Raises ValueError for an engine whose operators cannot be traced.
    """
    from miles_spmd.generation.sglang.engine import SglangEngine
    from miles_spmd.generation.sglang.operators import traced
    from miles_spmd.training.operator_outputs import operator_outputs

    if not isinstance(engine, SglangEngine):
        raise ValueError("rollout.engine: only the operators of 'sglang' can be compared with the trainer's")
    engine.flush()  # cached prefixes would skip the prefill that has to be traced
    with traced(engine) as of_engine:
        engine.submit([command.request])
        outputs = []
        while not engine.idle:
            outputs += engine.step()
    response = outputs[0].output_ids
    of_trainer = operator_outputs(network, [*command.request.input_ids, *response])
    found = first_difference(of_engine, of_trainer, network.family.num_layers, command.tokens)
    if found is None:
        return Bisection(response)
    what = (
        f"differs for {found.tokens} of {found.compared} tokens, first for number {found.token} of the sequence, by up "
        f"to {found.largest:.3g}"
    )
    return Bisection(response, found.operator, operators(network.family.num_layers).index(found.operator), what)
