"""What settings must not say together. The rules are small functions that stand below the table that they concern.

A rule reads the settings it needs from :class:`Settings` and yields messages that begin with the setting to change.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_spmd.config.backends import BackendMissingError, backend_fields
from miles_spmd.config.table import Table
from miles_spmd.models import read_config
from miles_spmd.models.hf_config import malformed_sizes

if TYPE_CHECKING:
    from miles_spmd.config import Config


class UnknownSettingError(LookupError):
    """A rule has read a setting that is not known, or whose value has an error: the rule is left out."""


class Settings(dict[str, Any]):
    """Values by dotted path, and by the name alone where no other table has a setting of that name.

    Beside our tables they hold keys of `[megatron]` and `[sglang]` and, as far as it is known: ``shape`` (the
    checkpoint's config.json), ``world_size``, ``trainer_ranks``, ``engine_ranks``, and ``capabilities`` (compute
    capabilities of the GPUs, "9.0"; none on a CPU).
    """

    def __missing__(self, name: str) -> Any:
        if name == "shape":
            shape = checkpoint_shape(self.hf_checkpoint)
            if shape is not None and not malformed_sizes(shape):  # which the family reports
                self["shape"] = shape
                return shape
        raise UnknownSettingError(name)

    def __getattr__(self, name: str) -> Any:
        return self[name]


Messages = Iterator[str]
Rule = Callable[[Settings], Messages]
ERRORS: list[Rule] = []  # why a configuration cannot run
TRAINING: list[Rule] = []  # why it cannot train
PARITY: list[Rule] = []  # why log-probs of engine and trainer cannot be bitwise equal
NOT_BY_DEFAULT: list[Rule] = []  # why "auto" leaves parity off although it is possible
WARNINGS: list[Rule] = []  # what is allowed but probably not intended
FILES: list[Rule] = []  # which files are missing
MACHINE: list[Rule] = []  # which packages are missing on this machine


def rule(kind: list[Rule]) -> Callable[[Rule], Rule]:
    """Register the function as a rule of this kind."""

    def register(function: Rule) -> Rule:
        kind.append(function)
        return function

    return register


def checkpoint_shape(folder: Path) -> dict[str, Any] | None:
    """Return the contents of a checkpoint's config.json, or None where it cannot be read."""
    try:
        shape = read_config(folder)
    except (OSError, ValueError):
        return None
    return shape if isinstance(shape, dict) else None


def settings(config: Table, *, without: Collection[str] = ()) -> Settings:
    """Every setting by its dotted path and, where it is unambiguous, by its name alone: ours, Megatron's and SGLang's,
    with the defaults of those that are not set. ``without`` has the dotted paths of settings and tables to leave out.
    """
    values = Settings()
    backends = [table for table in ("sglang", "megatron") if table in type(config).model_fields]
    for table in backends:
        with contextlib.suppress(BackendMissingError):
            values |= {name: field.default for name, field in backend_fields(table).items()}
    for table in reversed(backends):  # `attention_backend` is a key of both, and here means the engine's
        values |= getattr(config, table)
    for path in without:
        first, _, key = path.partition(".")
        if first in backends:
            values.pop(key, None)
    own = dict(_leaves(config, without))
    names = Counter(path.rpartition(".")[2] for path in own)
    values |= own
    values |= {name: value for path, value in own.items() if names[name := path.rpartition(".")[2]] == 1}
    return values


def _leaves(table: Table, without: Collection[str], where: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(table).model_fields:
        path, value = where + name, getattr(table, name)
        if path in without:
            continue
        if isinstance(value, Table):
            yield from _leaves(value, without, f"{path}.")
        else:
            yield path, value


def heads_divide(name: str, size: int, shape: Mapping[str, Any]) -> Messages:
    """Why the attention of a model of this ``shape`` cannot be split over the ranks that the setting ``name`` names."""
    heads, groups = shape.get("num_attention_heads"), shape.get("num_key_value_heads")
    if heads is not None and heads % size:
        yield f"{name}: {size} does not divide the model's {heads} attention heads"
    if groups is not None and groups % size and size % groups:
        yield f"{name}: {size} is not a multiple or divisor of the model's {groups} key-value heads"


def _violations(rules: list[Rule], settings: Settings) -> list[str]:
    """The messages of all rules whose settings are known."""
    messages: list[str] = []
    for function in rules:
        with contextlib.suppress(UnknownSettingError):
            messages += list(function(settings))
    return messages


def errors(
    config: Table,
    *,
    world_size: int | None = None,
    without: Collection[str] = (),
    check_files: bool = False,
    check_machine: bool = False,
    trains: bool = True,
) -> list[str]:
    """Why this configuration cannot run, or train if it ``trains``; with ``check_files`` also which checkpoint folders
    and data files are missing, with ``check_machine`` which packages. ``without`` names the settings that are known to
    have errors."""
    values = settings(config, without=without)
    if world_size is not None:
        values["world_size"] = world_size
        others = values.get("judge_num_gpus", 0) + values.get("second_num_gpus", 0)
        generating, of_policy = values.get("rollout_num_gpus"), world_size - others
        if generating is not None and generating < of_policy:  # else a kind of ranks is missing
            values |= {"trainer_ranks": of_policy - generating, "engine_ranks": generating or of_policy}
    kinds = [ERRORS, TRAINING if trains else [], PARITY if values.get("parity") == "bitwise" else []]
    kinds += [FILES if check_files else [], MACHINE if check_machine else []]
    return [message for kind in kinds for message in _violations(kind, values)]


def warnings(config: Table) -> list[str]:
    """What is allowed but probably not intended."""
    return _violations(WARNINGS, settings(config))


def decide_parity(config: Config, capabilities: Collection[str] | None) -> tuple[Config, list[str]]:
    """``config`` with "bitwise" or "off" in the place of "auto", and the reasons why it is off. Parity that was not
    asked for ends no run: a mismatch is a warning then. ``capabilities``: of the GPUs to be used; None: not known."""
    own = config.determinism
    if own.parity != "auto":
        return config, []
    values = settings(config)
    if capabilities is not None:
        values["capabilities"] = frozenset(capabilities)
    reasons = _violations([*PARITY, *NOT_BY_DEFAULT], values)
    decided = {"parity": "off"} if reasons else {"parity": "bitwise", "parity_gate": own.parity_gate or "warn"}
    return config.model_copy(update={"determinism": own.model_copy(update=decided)}), reasons
