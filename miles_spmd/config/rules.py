"""What settings must not say together: small functions that stand below the table that they concern.

A rule reads the settings it needs from :class:`Settings` and yields messages that begin with the setting to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class UnknownSettingError(LookupError):
    """A rule has read a setting that is not known, or whose value has an error: the rule is left out."""


class Settings(dict[str, Any]):
    """Values by dotted path, and by the name alone where no other table has a setting of that name.

    Beside our tables they hold keys of `[megatron]` and `[sglang]` and, as far as it is known: ``shape`` (the
    checkpoint's config.json), ``world_size``, ``trainer_ranks``, ``engine_ranks``, and ``capabilities`` (compute
    capabilities of the GPUs, "9.0"; none on a CPU).
    """

    def __missing__(self, name: str) -> Any:
        raise UnknownSettingError(name)

    def __getattr__(self, name: str) -> Any:
        return self[name]


Messages = Iterator[str]
Rule = Callable[[Settings], Messages]
ERRORS: list[Rule] = []  # why a configuration cannot run
PARITY: list[Rule] = []  # why log-probs of engine and trainer cannot be bitwise equal
NOT_BY_DEFAULT: list[Rule] = []  # why "auto" leaves parity off although it is possible
WARNINGS: list[Rule] = []  # what is allowed but probably not intended
FILES: list[Rule] = []  # which files and packages are missing


def rule(kind: list[Rule]) -> Callable[[Rule], Rule]:
    """Register the function as a rule of this kind."""

    def register(function: Rule) -> Rule:
        kind.append(function)
        return function

    return register


def violations(rules: list[Rule], settings: Settings) -> list[str]:
    """The messages of all rules whose settings are known."""
    messages: list[str] = []
    for function in rules:
        try:
            messages += list(function(settings))
        except UnknownSettingError:
            continue
    return messages
