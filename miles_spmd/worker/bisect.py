"""One request, answered by the engine and read by the trainer: which operator is the first to differ?"""

from __future__ import annotations

from miles_spmd.generation.engine import Engine
from miles_spmd.invariant.operator_outputs import first_difference, operators
from miles_spmd.protocol.messages import Bisect, Bisection
from miles_spmd.training.network import Network


def bisect(wanted: Bisect, engine: Engine, network: Network) -> Bisection:
    """On every rank, which compares its own part of the model. The engine runs without CUDA graphs and has weights.

    Raises ValueError for an engine whose operators nobody knows.
    """
    from miles_spmd.generation.sglang.engine import SglangEngine
    from miles_spmd.generation.sglang.operators import traced
    from miles_spmd.training.operator_outputs import operator_outputs

    if not isinstance(engine, SglangEngine):
        raise ValueError("rollout.engine: only the operators of 'sglang' can be compared with the trainer's")
    engine.flush()  # every token is to be read, none remembered
    with traced(engine) as of_engine:
        engine.submit([wanted.request])
        answers = []
        while not engine.idle:
            answers += engine.step()
    answer = answers[0].output_ids
    of_trainer = operator_outputs(network, [*wanted.request.input_ids, *answer])
    found = first_difference(of_engine, of_trainer, network.num_layers, wanted.tokens)
    if found is None:
        return Bisection(answer)
    what = (
        f"differs for {found.tokens} of {found.compared} tokens, first for number {found.token} of the sequence, by up "
        f"to {found.largest:.3g}"
    )
    return Bisection(answer, found.operator, operators(network.num_layers).index(found.operator), what)
