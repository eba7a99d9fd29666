"""How a setting's name becomes a function: a built-in by its name, or anybody's as ``module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class PlugPointError(ValueError):
    """A name that is neither a built-in nor an importable function: which setting, which name, what is known."""


@dataclass(frozen=True)
class PlugPoint(Generic[Function]):
    """The built-in functions of one setting of ``[table]`` by name."""

    setting: str
    builtins: Mapping[str, Function]
    table: str = "algorithm"

    def resolve(self, name: str) -> Function:
        """The function called ``name``. Raises PlugPointError."""
        if name in self.builtins:
            return self.builtins[name]
        where = f"{self.table}.{self.setting} = {name!r}"
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
