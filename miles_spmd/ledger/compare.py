"""Where two runs first differ: the step, the phase, the sample, the token or the tensor, and both values.

``ROLLOUT`` and ``UPDATE`` list what is compared of a rollout and of an optimizer step. Their order is that of the
computation, so that the first difference is a cause of those after it, and only the first is ever worked out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from miles_spmd.ledger.chain import LedgerError
from miles_spmd.ledger.entries import Digests, Saved, Step, Update, unpack
from miles_spmd.ledger.record import Record
from miles_spmd.ledger.step_data import Ragged, SampleData, StepData, UpdateData

MAX_NAMES = 4  # tensors that a message lists
LAYOUT = {  # settings that decide where, and in which pieces, the same work is done
    "ranks",
    "max_tokens_per_gpu",
    "offload_train",
    "offload_rollout",
    "rollout_num_gpus",
    "tp_size",
    "ep_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
}


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common and where they part. Values of the two runs stand left and right of a bar."""

    conditions: list[str]  # settings, code and machines that differ
    layout: list[str]  # settings that differ, but only decide how work is divided
    steps: list[int]  # that both runs have
    difference: str  # the first one between what was computed, "" where there is none

    @property
    def equal(self) -> bool:
        return not self.difference


def compare(a: Record, b: Record, steps: Sequence[int] | None = None, phase: str | None = None) -> Comparison:
    """Compare all steps that both runs have, or those of ``steps``.

    In phase "rollout" the training of the last step is left out, in "train" all samples are. Raises LedgerError if the
    runs have no step in common.
    """
    common = sorted(a.steps.keys() & b.steps.keys() & set(a.steps if steps is None else steps))
    if not common:
        raise LedgerError(f"{a.folder} and {b.folder} have no step in common")
    conditions, layout = list[str](), list[str]()
    for name, values in _conditions(a, b, common[0]):
        (layout if name.rpartition(".")[2] in LAYOUT else conditions).append(f"{name}: {values}")
    return Comparison(conditions, layout, common, next(_differences(a, b, common, phase), ""))


def _conditions(a: Record, b: Record, step: int) -> Iterator[tuple[str, str]]:
    """Yield name and both values of each setting, version and machine property that differs."""
    contexts = (a.context(step), b.context(step))
    sides = [_flat({**c.config, "code of miles_spmd": c.code[:12], **c.environment}) for c in contexts]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        values = [side.get(name) for side in sides]
        if values[0] != values[1]:
            yield name, " | ".join(map(repr, values))


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


# --- the order of the computation ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """The same rollout, or the same update, in two runs."""

    a: Any  # Samples or Update: the digests
    b: Any
    data: Callable[[], tuple[Any, Any] | None]  # SampleData or UpdateData, if both runs still have what was digested
    item_name: Callable[[int], str]  # of the sample or sequence with this index
    tensor_names: Sequence[str] = ()


class _StepData:
    """The data of one step of both runs; read when a difference is to be described, since equal runs need none."""

    def __init__(self, a: Record, b: Record, step: int) -> None:
        self._runs, self._step = (a, b), step

    @cached_property
    def _both(self) -> list[StepData | None]:
        return [run.data(self._step) for run in self._runs]

    def samples(self) -> tuple[SampleData, SampleData] | None:
        a, b = (data and data.samples for data in self._both)
        return (a, b) if a and b else None

    def update(self, number: int) -> tuple[UpdateData, UpdateData] | None:
        a, b = self._both
        if a and b and number < min(len(a.updates), len(b.updates)):
            return a.updates[number], b.updates[number]
        return None

    def sample_name(self, index: int) -> str:
        for data in self._both:
            if data and data.samples and index < len(data.samples.uids):
                return f"sample {index} ({_identity(data.samples, index)})"
        return f"sample {index}"


def _differences(a: Record, b: Record, steps: Sequence[int], phase: str | None) -> Iterator[str]:
    tensor_names = a.context(steps[0]).tensors
    before = a.weights_before(steps[0]), b.weights_before(steps[0])
    for role in sorted(before[0].keys() | before[1].keys()):
        for what in _tensors(tensor_names.get(role, []), *(side.get(role, b"") for side in before)):
            yield f"before step {steps[0]}: weights of the {role}: {what}"
    for step in steps:
        data = _StepData(a, b, step)
        if phase != "train":
            yield from (f"step {step}, rollout: {what}" for what in _rollout(a.steps[step], b.steps[step], data))
        if phase != "rollout" or step != steps[-1]:
            updates = _updates(a.steps[step].updates, b.steps[step].updates, data, tensor_names)
            yield from (f"step {step}, train: {what}" for what in updates)
        if step + 1 in a.saved and step + 1 in b.saved:
            yield from _checkpoints(a.saved[step + 1], b.saved[step + 1], tensor_names)


def _rollout(a: Step, b: Step, data: _StepData) -> Iterator[str]:
    if a.samples and b.samples:
        pair = Pair(a.samples, b.samples, data.samples, data.sample_name)
        yield from (what for row in ROLLOUT for what in row.differences(pair))
    elif a.samples is not b.samples:
        yield f"responses were {' | '.join('generated' if side.samples else 'given' for side in (a, b))}"


def _updates(
    a: Sequence[Update], b: Sequence[Update], data: _StepData, tensor_names: Mapping[str, list[str]]
) -> Iterator[str]:
    trained: Counter[str] = Counter()  # sequences of earlier updates by role, which are those of the rollout in order
    for number, (one, other) in enumerate(zip(a, b)):
        if one.role != other.role:
            yield f"update {number} is of the {one.role} | {other.role}"

        def name(index: int, first: int = trained[one.role]) -> str:
            return data.sample_name(first + index)

        pair = Pair(one, other, partial(data.update, number), name, tensor_names.get(one.role, []))
        yield from (f"update {number} ({one.role}): {what}" for row in UPDATE for what in row.differences(pair))
        trained[one.role] += len(unpack(one.inputs))
    if len(a) != len(b):
        yield f"{len(a)} | {len(b)} updates"


def _checkpoints(a: Saved, b: Saved, tensor_names: Mapping[str, list[str]]) -> Iterator[str]:
    for role in sorted(a.optimizers.keys() & b.optimizers.keys()):
        one, other = a.optimizers[role], b.optimizers[role]
        for kind in sorted(one.keys() & other.keys()):
            for what in _tensors(tensor_names.get(role, []), one[kind], other[kind]):
                yield f"checkpoint of step {a.step}: {kind} of the {role}'s optimizer: {what}"


# --- what is compared, and how a difference is described -------------------------------------------------------------


@dataclass(frozen=True)
class Items:
    """Digests of every sample or sequence; the first one in which any of ``fields`` differs is described."""

    fields: tuple[str, ...]
    without_data: str  # the description if the data are gone
    describe: Callable[[Any, Any, int], str]  # from the data of both runs and the index
    plural: str = ""  # where these digests identify the items: then their number and order are compared, too

    def differences(self, pair: Pair) -> Iterator[str]:
        one, other = ([unpack(getattr(side, field)) for field in self.fields] for side in (pair.a, pair.b))
        if self.plural and len(one[0]) != len(other[0]):
            yield f"{len(one[0])} | {len(other[0])} {self.plural}"
        unequal = [place for a, b in zip(one, other) if (place := _first_place(a, b)) is not None]
        if not unequal:
            return
        index = min(unequal)
        if self.plural and np.array_equal(np.sort(one[0]), np.sort(other[0])):
            yield f"the same {self.plural} in another order, from {pair.item_name(index)} on"
        data = pair.data()
        yield f"{pair.item_name(index)}: {self.describe(*data, index) if data else self.without_data}"


@dataclass(frozen=True)
class Number:
    """A number, or a table of them."""

    field: str
    label: str = ""

    def differences(self, pair: Pair) -> Iterator[str]:
        one, other = getattr(pair.a, self.field), getattr(pair.b, self.field)
        if not isinstance(one, Mapping):
            one, other = ({self.label or self.field: value} for value in (one, other))
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                yield f"{name} {one.get(name)} | {other.get(name)}"


@dataclass(frozen=True)
class Tensors:
    """Digests of all tensors of a model."""

    field: str
    label: str

    def differences(self, pair: Pair) -> Iterator[str]:
        digests = getattr(pair.a, self.field), getattr(pair.b, self.field)
        yield from (f"{self.label}: {what}" for what in _tensors(pair.tensor_names, *digests))


def _request(a: SampleData, b: SampleData, index: int) -> str:
    one, other = _identity(a, index), _identity(b, index)
    if one != other:
        return f"another request: {one} | {other}"
    return _array("prompt", a.prompts, b.prompts, index) or "sampled with another seed"


def _response(a: SampleData, b: SampleData, index: int) -> str:
    """Tokens and their log-probs are compared side by side: the first place in which either differs counts."""
    found = {
        "token": _first(a.responses.split()[index], b.responses.split()[index]),
        "log-prob": _first(a.log_probs.split()[index], b.log_probs.split()[index]),
    }
    places = [place[0] for place in found.values() if place]
    if not places:
        return "equal tokens and log-probs, but another loss mask, finish reason or weight version"
    here = [f"{what} {p[1]} | {p[2]}" for what, p in found.items() if p and p[0] == min(places)]
    return f"response, token {min(places)}: {', '.join(here)}"


def _reward(a: SampleData, b: SampleData, index: int) -> str:
    values = f"reward {a.rewards[index]} | {b.rewards[index]}"
    details = a.reward_details[index], b.reward_details[index]
    return values if details[0] == details[1] else f"{values}, details {details[0]} | {details[1]}"


def _field(a: UpdateData, b: UpdateData, index: int) -> str:
    """Describe the first field of a sequence that differs."""
    for name in dict.fromkeys([*a.fields, *b.fields]):
        if name not in a.fields or name not in b.fields:
            return f"{name} in one run only"
        if what := _array(name, a.fields[name], b.fields[name], index):
            return what
    return "differs"


def _log_probs(a: UpdateData, b: UpdateData, index: int) -> str:
    return _array("log-probs of the forward pass", a.log_probs, b.log_probs, index)


ROLLOUT: tuple[Items | Number, ...] = (
    Items(("requests",), "another prompt or seed", _request, plural="requests"),
    Items(("responses", "log_probs"), "response or its log-probs differ", _response),
    Items(("rewards",), "rewards differ", _reward),
    Number("dropped", "groups dropped by the filter:"),
)
UPDATE: tuple[Items | Number | Tensors, ...] = (
    Items(("inputs",), "tokens, loss weights or log-probs differ", _field, plural="sequences"),
    Items(("advantages",), "advantages differ", _field),
    Items(("log_probs",), "log-probs of the forward pass differ", _log_probs),
    Number("sums"),
    Tensors("gradient", "gradient"),
    Number("grad_norm"),
    Number("lr"),
    Number("skipped"),
    Tensors("weights", "weights after the update"),
)


# --- arrays ----------------------------------------------------------------------------------------------------------


def _identity(data: SampleData, index: int) -> str:
    return f"response {data.indices[index]} to {data.uids[index]}"


def _array(name: str, a: Ragged, b: Ragged, index: int) -> str:
    place = _first(a.split()[index], b.split()[index])
    return f"{name}, token {place[0]}: {place[1]} | {place[2]}" if place else ""


def _first(a: np.ndarray, b: np.ndarray) -> tuple[int, str, str] | None:
    """Return place and values of the first bitwise difference; "none" where one array has ended. None if equal."""
    place = _first_place(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))
    if place is None:
        return None
    one, other = (str(side[place]) if place < len(side) else "none" for side in (a, b))
    return place, one, other


def _first_place(a: np.ndarray, b: np.ndarray) -> int | None:
    size = min(len(a), len(b))
    places = np.flatnonzero(a[:size] != b[:size])
    if len(places):
        return int(places[0])
    return size if len(a) != len(b) else None


def _tensors(names: Sequence[str], a: Digests, b: Digests) -> Iterator[str]:
    """Yield at most one message."""
    one, other = unpack(a), unpack(b)
    if len(one) != len(other) or len(one) != len(names):
        yield f"{len(one)} | {len(other)} tensors"
        return
    places = np.flatnonzero(one != other).tolist()
    if places:
        listed = ", ".join(names[place] for place in places[:MAX_NAMES])
        more = f" and {len(places) - MAX_NAMES} more" if len(places) > MAX_NAMES else ""
        values = f"{one[places[0]]:016x} | {other[places[0]]:016x}"
        yield f"{len(places)} of {len(names)} tensors differ: {listed}{more}; digests of the first {values}"
