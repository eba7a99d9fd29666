"""Where two runs first differ: the step, the phase, the sample, the token or the tensor, and both values.

``_rollout`` and ``_updates`` list what is compared of a rollout and of an optimizer step. Their order is that of the
computation, so that the first difference is a cause of those after it, and only the first is ever worked out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from miles_spmd.ledger.chain import LedgerError, Record
from miles_spmd.ledger.entries import Context, Digests, Samples, Saved, Update, unpack
from miles_spmd.ledger.step_data import Ragged, SampleData, StepData, UpdateData
from miles_spmd.models.blocks.experts import is_trained
from miles_spmd.types.engine_group import POLICY, SECOND_POLICY, in_group

MAX_NAMES = 4  # tensors that a message lists
# settings that decide where, and in which pieces, the same work is done
LAYOUT = re.compile(
    "ranks|max_tokens_per_gpu|offload_(train|rollout)|(rollout|judge)_num_gpus|(tp|ep)_size|.*_parallel_size"
    "|num_layers_per_virtual_pipeline_stage|sequence_parallel|use_distributed_optimizer"
    "|environment_(workers|concurrency|cache_share)"
)


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common and where they part. Values of the two runs stand left and right of a bar."""

    conditions: list[str]  # settings, code and machines that differ
    layout: list[str]  # settings that differ, but only decide how work is divided
    changes: list[str]  # what either run changed when it was resumed
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
    contexts = (run.context(common[0]) for run in (a, b))
    one, other = map(_conditions, contexts)
    conditions, layout = list[str](), list[str]()
    for name in one | other:
        if one.get(name) != other.get(name):
            kind = layout if LAYOUT.fullmatch(name.rpartition(".")[2]) else conditions
            kind.append(f"{name}: {one.get(name)!r} | {other.get(name)!r}")
    changes = [f"{run.folder}: {change}" for run in (a, b) for change in _changes(run)]
    return Comparison(conditions, layout, changes, common, next(_differences(a, b, common, phase), ""))


def _conditions(context: Context) -> dict[str, Any]:
    return _flat({**context.config, "code of miles_spmd": context.code[:12], **context.environment})


def _changes(run: Record) -> Iterator[str]:
    """Yield in words what the run was resumed with that differs from what it had before."""
    for before, after in zip(run.contexts, run.contexts[1:]):
        one, other = _conditions(before), _conditions(after)
        changed = [name for name in one | other if one.get(name) != other.get(name)]
        if changed:
            values = "; ".join(f"{name}: {one.get(name)!r} -> {other.get(name)!r}" for name in changed)
            yield f"from step {after.step} on: {values}"


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


# --- the order of the computation ------------------------------------------------------------------------------------


def _differences(a: Record, b: Record, steps: Sequence[int], phase: str | None) -> Iterator[str]:
    tensor_names = a.context(steps[0]).tensors
    before = a.weights_before(steps[0]), b.weights_before(steps[0])
    for role in sorted(before[0].keys() | before[1].keys()):
        where = f"before step {steps[0]}: weights of the {role}"
        yield from _tensors(where, tensor_names.get(role, []), *(side.get(role, b"") for side in before))
    for step in steps:
        data = cache(partial(_read, a, b, step))  # called only where a difference is to be described
        plays = _players(a.context(step))
        one, other = a.steps[step], b.steps[step]
        if phase != "train":
            yield from _rollout(f"step {step}, rollout", one.samples, other.samples, data)
        if phase != "rollout" or step != steps[-1]:
            yield from _updates(f"step {step}, train", one.updates, other.updates, data, tensor_names, plays)
        if step + 1 in a.saved and step + 1 in b.saved:
            yield from _checkpoints(a.saved[step + 1], b.saved[step + 1], tensor_names)


def _read(a: Record, b: Record, step: int) -> list[StepData]:
    return [run.data(step) or StepData(None, []) for run in (a, b)]


def _rollout(where: str, a: Samples | None, b: Samples | None, data: Callable[[], list[StepData]]) -> Iterator[str]:
    if a is None or b is None:
        if a is not b:
            yield f"{where}: responses were {' | '.join('generated' if side else 'given' for side in (a, b))}"
        return
    pair = Pair(where, a, b, data)
    yield from pair.items(_request, "another prompt or seed", "requests", plural="requests")
    yield from pair.items(_response, "response or its log-probs differ", "responses", "log_probs")
    yield from pair.items(_reward, "rewards differ", "rewards")
    if a.dropped != b.dropped:
        yield f"{where}: groups dropped by the filter: {a.dropped} | {b.dropped}"


def _updates(
    where: str,
    a: Sequence[Update],
    b: Sequence[Update],
    data: Callable[[], list[StepData]],
    tensor_names: Mapping[str, list[str]],
    plays: Callable[[str], str],
) -> Iterator[str]:
    # sequences of earlier updates by model, which are in order those of the rollout that its policy plays
    trained: Counter[str] = Counter()
    for number, (one, other) in enumerate(zip(a, b)):
        if one.role != other.role:
            yield f"{where}: update {number} is of the {one.role} | {other.role}"
        here, names = f"{where}: update {number} ({one.role})", tensor_names.get(one.role, [])
        pair = Pair(here, one, other, data, number, trained[one.role], partial(_of_policy, one.role, plays))
        yield from pair.items(_field, "tokens, loss weights or log-probs differ", "inputs", plural="sequences")
        yield from pair.items(_field, "advantages differ", "advantages")
        yield from pair.items(_log_probs, "log-probs of the forward pass differ", "log_probs")
        yield from _texts(f"{here}: ", one.sums, other.sums)
        yield from _tensors(f"{here}: gradient", list(filter(is_trained, names)), one.gradient, other.gradient)
        yield from _texts(
            f"{here}: ", *({n: getattr(side, n) for n in ("grad_norm", "lr", "skipped")} for side in (one, other))
        )
        yield from _tensors(f"{here}: weights after the update", names, one.weights, other.weights)
        trained[one.role] += len(unpack(one.inputs))
    if len(a) != len(b):
        yield f"{where}: {len(a)} | {len(b)} updates"


def _players(context: Context) -> Callable[[str], str]:
    """Return the function from a role to the policy that plays it."""
    of_second = (context.config.get("second_policy") or {}).get("second_roles") or []
    return lambda role: SECOND_POLICY if role in of_second else POLICY


def _of_policy(model: str, plays: Callable[[str], str], role: str) -> bool:
    """Whether the samples of ``role`` are those that ``model`` is trained on."""
    return model == in_group(plays(role), model.rpartition("/")[2])


def _checkpoints(a: Saved, b: Saved, tensor_names: Mapping[str, list[str]]) -> Iterator[str]:
    for role in sorted(a.optimizers.keys() & b.optimizers.keys()):
        one, other = a.optimizers[role], b.optimizers[role]
        for kind in sorted(one.keys() & other.keys()):
            where = f"checkpoint of step {a.step}: {kind} of the {role}'s optimizer"
            yield from _tensors(where, list(filter(is_trained, tensor_names.get(role, []))), one[kind], other[kind])


# --- what is compared, and how a difference is described -------------------------------------------------------------


class Pair(NamedTuple):
    """The samples of a rollout, or the sequences of an update, in two runs."""

    where: str
    a: Any  # Samples or Update: the digests
    b: Any
    step: Callable[[], list[StepData]]  # what the runs still have of the step's data
    number: int | None = None  # of the update, None: the samples
    first: int = 0  # index of the first item among those that belong here
    belongs: Callable[[str], bool] = lambda role: True  # whether the samples of a role do

    def items(
        self, describe: Callable[[Any, Any, int], str], without_data: str, *fields: str, plural: str = ""
    ) -> Iterator[str]:
        """Yield what the first sample or sequence is of which a digest in ``fields`` differs.

        ``describe`` names it from the data of both runs and the index, ``without_data`` where they are gone. ``plural``
        is given where these digests identify the items: then their number and order are compared, too.
        """
        one, other = ([unpack(getattr(side, field)) for field in fields] for side in (self.a, self.b))
        if plural and len(one[0]) != len(other[0]):
            yield f"{self.where}: {len(one[0])} | {len(other[0])} {plural}"
        unequal = [place for a, b in zip(one, other) if (place := _first_place(a, b)) is not None]
        if not unequal:
            return
        index = min(unequal)
        name = f"sample {self.first + index}"
        for samples in (side.samples for side in self.step()):
            roles = (samples.roles or [""] * len(samples.uids)) if samples else []
            own = [place for place, role in enumerate(roles) if self.belongs(role)]
            if samples and self.first + index < len(own):
                name = f"sample {own[self.first + index]} ({_identity(samples, own[self.first + index])})"
                break
        if plural and np.array_equal(np.sort(one[0]), np.sort(other[0])):
            yield f"{self.where}: the same {plural} in another order, from {name} on"
        parts: list[Any] = [side.samples for side in self.step()]
        if self.number is not None:
            parts = [dict(enumerate(side.updates)).get(self.number) for side in self.step()]
        yield f"{self.where}: {name}: {describe(parts[0], parts[1], index) if all(parts) else without_data}"


def _texts(prefix: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    names = sorted(a.keys() | b.keys())
    return [f"{prefix}{name} {a.get(name)} | {b.get(name)}" for name in names if a.get(name) != b.get(name)]


def _request(a: SampleData, b: SampleData, index: int) -> str:
    one, other = _identity(a, index), _identity(b, index)
    if one != other:
        return f"another request: {one} | {other}"
    return _first("prompt", index, ("", a.prompts, b.prompts)) or "sampled with another seed"


def _response(a: SampleData, b: SampleData, index: int) -> str:
    """Tokens and their log-probs are compared side by side: the first place in which either differs counts."""
    columns = ("token ", a.responses, b.responses), ("log-prob ", a.log_probs, b.log_probs)
    same = "equal tokens and log-probs, but another loss mask, finish reason or weight version"
    return _first("response", index, *columns) or same


def _reward(a: SampleData, b: SampleData, index: int) -> str:
    """Describe the reward if it differs, and the details that differ: numbers that the reward function returned beside
    it, by their names; and those of turns."""
    # as text, like their digests: NaN is equal to NaN, and 0 is not equal to -0
    one, other = ({name: str(v) for name, v in side.reward_details[index].items()} for side in (a, b))
    found = _texts("detail ", one, other)
    turns = [str(side.turn_rewards[index] if side.turn_rewards else []) for side in (a, b)]
    if turns[0] != turns[1]:
        found = [f"of turns {turns[0]} | {turns[1]}", *found]
    if str(a.rewards[index]) != str(b.rewards[index]):
        found = [f"{a.rewards[index]} | {b.rewards[index]}", *found]
    if not found:  # equal as a table, but not as what the function returned
        found = [f"details in another order: {', '.join(one)} | {', '.join(other)}"]
    return f"reward {', '.join(found)}"


def _log_probs(a: UpdateData, b: UpdateData, index: int) -> str:
    return _first("log-probs of the forward pass", index, ("", a.log_probs, b.log_probs))


def _field(a: UpdateData, b: UpdateData, index: int) -> str:
    """Describe the first field of a sequence that differs."""
    for name in dict.fromkeys([*a.fields, *b.fields]):
        if name not in a.fields or name not in b.fields:
            return f"{name} in one run only"
        if what := _first(name, index, ("", a.fields[name], b.fields[name])):
            return what
    return "differs"


# --- arrays ----------------------------------------------------------------------------------------------------------


def _identity(data: SampleData, index: int) -> str:
    role = f" of {data.roles[index]}" if data.roles and data.roles[index] else ""
    return f"response {data.indices[index]}{role} to {data.uids[index]}"


def _first(name: str, index: int, *columns: tuple[str, Ragged, Ragged]) -> str:
    """Describe the first place at which item ``index`` of a column differs bitwise between the runs, and all columns
    that differ there, each with a label; "none" stands for the value where one array has ended. "" if all are equal."""
    found: dict[int, list[str]] = {}
    for label, *sides in columns:
        a, b = (side.split()[index] for side in sides)
        place = _first_place(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))
        if place is not None:
            values = (str(side[place]) if place < len(side) else "none" for side in (a, b))
            found.setdefault(place, []).append(label + " | ".join(values))
    return f"{name}, token {min(found)}: {', '.join(found[min(found)])}" if found else ""


def _first_place(a: np.ndarray, b: np.ndarray) -> int | None:
    size = min(len(a), len(b))
    places = np.flatnonzero(np.append(a[:size] != b[:size], len(a) != len(b)))
    return int(places[0]) if len(places) else None


def _tensors(where: str, names: Sequence[str], a: Digests, b: Digests) -> Iterator[str]:
    """Yield at most one message."""
    one, other = unpack(a), unpack(b)
    if len(one) != len(other) or len(one) != len(names):
        yield f"{where}: {len(one)} | {len(other)} tensors"
        return
    places = np.flatnonzero(one != other).tolist()
    if places:
        listed = ", ".join(names[place] for place in places[:MAX_NAMES])
        more = f" and {len(places) - MAX_NAMES} more" if len(places) > MAX_NAMES else ""
        values = f"{one[places[0]]:016x} | {other[places[0]]:016x}"
        yield f"{where}: {len(places)} of {len(names)} tensors differ: {listed}{more}; digests of the first {values}"
