"""Where two runs part, in words: the step, the phase, the sample, the token or the tensor, and both values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miles_spmd.ledger.chain import LedgerError
from miles_spmd.ledger.entries import Digests, Samples, Saved, Step, Update, unpack
from miles_spmd.ledger.record import Record
from miles_spmd.ledger.step_data import Ragged, SampleData, StepData, UpdateData

MAX_NAMES = 4  # of tensors that differ
LAYOUT = {  # what decides where and in which pieces the same work is done
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
    """``conditions``: settings, code and machines that are not the same; ``layout``: those that only say how work was
    cut. ``difference``: the first one between what was computed, "" where there is none. Values of the two runs stand
    left and right of a bar."""

    conditions: list[str]
    layout: list[str]
    steps: list[int]  # that both have
    difference: str

    @property
    def equal(self) -> bool:
        return not self.difference


def compare(a: Record, b: Record, steps: Sequence[int] | None = None, phase: str | None = None) -> Comparison:
    """Of all steps that both have, or of ``steps``; in phase "rollout" the last one's training is left out, in "train"
    all samples are. Raises LedgerError where there is nothing to compare."""
    common = sorted(a.steps.keys() & b.steps.keys() & set(a.steps if steps is None else steps))
    if not common:
        raise LedgerError(f"{a.folder} and {b.folder} have no step in common")
    first = common[0]
    conditions, layout = list[str](), list[str]()
    for name, values in _conditions(a, b, first):
        (layout if name.rpartition(".")[2] in LAYOUT else conditions).append(f"{name}: {values}")
    return Comparison(conditions, layout, common, next(_differences(a, b, common, phase), ""))


def _differences(a: Record, b: Record, steps: Sequence[int], phase: str | None) -> Iterator[str]:
    first = steps[0]
    names = a.context(first).tensors
    before = a.weights_before(first), b.weights_before(first)
    for role in sorted(before[0].keys() | before[1].keys()):
        for what in _tensors(names.get(role, []), *(side.get(role, b"") for side in before)):
            yield f"before step {first}: weights of the {role}: {what}"
    for step in steps:
        pair, kept = (a.steps[step], b.steps[step]), _Kept(a.data(step), b.data(step))
        if phase != "train":
            yield from (f"step {step}, rollout: {what}" for what in _samples(pair, kept))
        if phase != "rollout" or step != steps[-1]:
            yield from (f"step {step}, train: {what}" for what in _updates(pair, kept, names))
        if step + 1 in a.saved and step + 1 in b.saved:
            yield from _checkpoints(a.saved[step + 1], b.saved[step + 1], names)


# --- what the runs ran under -----------------------------------------------------------------------------------------


def _conditions(a: Record, b: Record, step: int) -> Iterator[tuple[str, str]]:
    """Names, and the values on both sides."""
    one, other = a.context(step), b.context(step)
    sides = [_flat({**side.config, "code of miles_spmd": side.code[:12], **side.environment}) for side in (one, other)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        values = [side.get(name) for side in sides]
        if values[0] != values[1]:
            yield name, " | ".join(map(repr, values))


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


# --- rollout ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """The data of one step on both sides, as far as they were kept."""

    a: StepData | None
    b: StepData | None

    def samples(self) -> tuple[SampleData, SampleData] | None:
        return (self.a.samples, self.b.samples) if self.a and self.b and self.a.samples and self.b.samples else None

    def updates(self, index: int) -> tuple[UpdateData, UpdateData] | None:
        if self.a and self.b and index < min(len(self.a.updates), len(self.b.updates)):
            return self.a.updates[index], self.b.updates[index]
        return None

    def name(self, index: int) -> str:
        """Of the sample with this number in order of submission."""
        samples = (self.a and self.a.samples) or (self.b and self.b.samples)
        if not samples or index >= len(samples.uids):
            return f"sample {index}"
        return f"sample {index} (number {samples.indices[index]} of {samples.uids[index]})"


def _samples(pair: tuple[Step, Step], kept: _Kept) -> Iterator[str]:
    a, b = (step.samples for step in pair)
    if a is None or b is None:
        if a is not b:
            yield f"answers were {'given' if a is None else 'generated'} | {'given' if b is None else 'generated'}"
        return
    yield from _requests(a, b, kept)
    both = kept.samples()
    for index in _unequal((a.responses, b.responses), (a.log_probs, b.log_probs)):
        yield f"{kept.name(index)}: {_answer(*both, index) if both else 'answer or its log-probs differ'}"
    for index in _unequal((a.rewards, b.rewards)):
        values = f" {both[0].rewards[index]} | {both[1].rewards[index]}" if both else "s differ"
        yield f"{kept.name(index)}: reward{values}"
    if a.dropped != b.dropped:
        yield f"the filter dropped {a.dropped} | {b.dropped} groups"


def _requests(a: Samples, b: Samples, kept: _Kept) -> Iterator[str]:
    one, other = unpack(a.requests), unpack(b.requests)
    if len(one) != len(other):
        yield f"{len(one)} | {len(other)} samples"
        return
    for index in _unequal((a.requests, b.requests)):
        if np.array_equal(np.sort(one), np.sort(other)):
            yield f"prompts: the same in another order, from {kept.name(index)} on"
            return
        both = kept.samples()
        yield f"prompts: {_prompt(*both, index) if both else f'sample {index} has another prompt or seed'}"


def _prompt(a: SampleData, b: SampleData, index: int) -> str:
    one, other = (f"number {s.indices[index]} of {s.uids[index]}" for s in (a, b))
    if one != other:
        return f"sample {index} is {one} | {other}"
    place = _first(a.prompts.split()[index], b.prompts.split()[index])
    if place is None:
        return f"sample {index} ({one}) was drawn with another seed"
    return f"sample {index} ({one}): token {place[0]} of the prompt is {place[1]} | {place[2]}"


def _answer(a: SampleData, b: SampleData, index: int) -> str:
    """Tokens and their log-probs run side by side: the first place where one of them differs."""
    found = {
        "token": _first(a.responses.split()[index], b.responses.split()[index]),
        "log-prob": _first(a.log_probs.split()[index], b.log_probs.split()[index]),
    }
    places = [place[0] for place in found.values() if place]
    if not places:
        return "the same tokens, with another mask, reason of the end or weight version"
    here = [f"{what} {p[1]} | {p[2]}" for what, p in found.items() if p and p[0] == min(places)]
    return f"at token {min(places)} of the answer: {', '.join(here)}"


# --- training --------------------------------------------------------------------------------------------------------


def _updates(pair: tuple[Step, Step], kept: _Kept, names: Mapping[str, list[str]]) -> Iterator[str]:
    seen: dict[str, int] = {}  # sequences of earlier updates, by role
    for number, (a, b) in enumerate(zip(pair[0].updates, pair[1].updates)):
        if a.role != b.role:
            yield f"update {number} is of the {a.role} | {b.role}"
            return
        for what in _update(a, b, kept, kept.updates(number), seen.get(a.role, 0), names.get(a.role, [])):
            yield f"update {number} ({a.role}): {what}"
        seen[a.role] = seen.get(a.role, 0) + len(a.inputs) // 8
    if len(pair[0].updates) != len(pair[1].updates):
        yield f"{len(pair[0].updates)} | {len(pair[1].updates)} updates"


def _update(
    a: Update, b: Update, kept: _Kept, both: tuple[UpdateData, UpdateData] | None, start: int, names: list[str]
) -> Iterator[str]:
    """In the order in which one thing follows from the other."""
    one, other = unpack(a.inputs), unpack(b.inputs)
    if len(one) != len(other):
        yield f"{len(one)} | {len(other)} sequences"
        return
    for index in _unequal((a.inputs, b.inputs)):
        name = kept.name(start + index)
        if np.array_equal(np.sort(one), np.sort(other)):
            yield f"the same sequences in another order, from {name} on"
            return
        yield f"{name}: {_field(both, index) if both else 'its tokens, weights or log-probs differ'}"
    for index in _unequal((a.advantages, b.advantages)):
        yield f"{kept.name(start + index)}: {_field(both, index, 'advantages') if both else 'its advantages differ'}"
    for index in _unequal((a.log_probs, b.log_probs)):
        what = _place("log-probs of the forward pass", both[0].log_probs, both[1].log_probs, index) if both else ""
        yield f"{kept.name(start + index)}: {what or 'log-probs of the forward pass differ'}"
    for name in sorted(a.sums.keys() | b.sums.keys()):
        if a.sums.get(name) != b.sums.get(name):
            yield f"{name} {a.sums.get(name)} | {b.sums.get(name)}"
    yield from (f"gradient: {what}" for what in _tensors(names, a.gradient, b.gradient))
    for name in ("grad_norm", "lr", "skipped"):
        if getattr(a, name) != getattr(b, name):
            yield f"{name} {getattr(a, name)} | {getattr(b, name)}"
    yield from (f"weights after it: {what}" for what in _tensors(names, a.weights, b.weights))


def _field(both: tuple[UpdateData, UpdateData], index: int, only: str = "") -> str:
    """The first field of a sequence that differs, and where."""
    a, b = (side.fields for side in both)
    for name in [only] if only else dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            return f"has {name} on one side only"
        if what := _place(name, a[name], b[name], index):
            return what
    return "differs"


def _place(what: str, a: Ragged, b: Ragged, index: int) -> str:
    place = _first(a.split()[index], b.split()[index])
    return f"{what}, token {place[0]}: {place[1]} | {place[2]}" if place else ""


def _checkpoints(a: Saved, b: Saved, names: Mapping[str, list[str]]) -> Iterator[str]:
    for role in sorted(a.optimizers.keys() & b.optimizers.keys()):
        for kind in sorted(a.optimizers[role].keys() & b.optimizers[role].keys()):
            for what in _tensors(names.get(role, []), a.optimizers[role][kind], b.optimizers[role][kind]):
                yield f"checkpoint of step {a.step}: {kind} of the {role}'s optimizer: {what}"


# --- arrays ----------------------------------------------------------------------------------------------------------


def _unequal(*pairs: tuple[Digests, Digests]) -> list[int]:
    """The first index at which any of the pairs differs, or none."""
    found = []
    for a, b in pairs:
        one, other = unpack(a), unpack(b)
        size = min(len(one), len(other))
        places = np.flatnonzero(one[:size] != other[:size])
        found += [int(places[0])] if len(places) else [size] if len(one) != len(other) else []
    return [min(found)] if found else []


def _first(a: np.ndarray, b: np.ndarray) -> tuple[int, str, str] | None:
    """Place and values of the first difference, bit for bit; "nothing" where one has ended."""
    size = min(len(a), len(b))
    places = np.flatnonzero(a[:size].view(f"u{a.itemsize}") != b[:size].view(f"u{b.itemsize}"))
    if not len(places) and len(a) == len(b):
        return None
    place = int(places[0]) if len(places) else size
    one, other = (str(side[place]) if place < len(side) else "nothing" for side in (a, b))
    return place, one, other


def _tensors(names: Sequence[str], a: Digests, b: Digests) -> Iterator[str]:
    """At most one message."""
    one, other = unpack(a), unpack(b)
    if len(one) != len(other) or len(one) != len(names):
        yield f"of {len(one)} | {len(other)} tensors"
        return
    places = np.flatnonzero(one != other).tolist()
    if places:
        listed = ", ".join(names[place] for place in places[:MAX_NAMES])
        more = f" and {len(places) - MAX_NAMES} more" if len(places) > MAX_NAMES else ""
        values = f"{one[places[0]]:016x} | {other[places[0]]:016x}"
        yield f"{len(places)} of {len(names)} tensors differ: {listed}{more}; digests of the first {values}"
