"""From the value of a setting to a function: a built-in by its name, or a user's as ``module:function``."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from miles_spmd.plugins.renamed import accept_old_names

Function = TypeVar("Function", bound=Callable[..., Any])


class PlugPointError(ValueError):
    """A setting that names neither a built-in nor an importable function. The message gives setting, name and cause."""


def import_function(setting: str, name: str, known: Iterable[str]) -> Callable[..., Any]:
    """Import ``module:function`` (or ``module:Class.method``), which ``setting`` names.

    Raises PlugPointError if ``name`` has another form, in which case the built-ins ``known`` are listed, if the module
    or the attribute cannot be imported, and if the attribute is not callable.
    """
    where = f"{setting} = {name!r}"
    module, _, path = name.partition(":")
    if not module or not path:
        raise PlugPointError(f"{where} is unknown; known: {', '.join(known)}, or your own `module:function`")
    accept_old_names()
    try:
        target: Any = importlib.import_module(module)
        for part in path.split("."):
            target = getattr(target, part)
    except Exception as error:
        raise PlugPointError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(target):
        raise PlugPointError(f"{where} is of type {type(target).__name__}; it must be a function")
    return target


@dataclass(frozen=True)
class PlugPoint(Generic[Function]):
    """A setting, such as ``algorithm.loss_type``, and the built-in functions that it can name."""

    setting: str
    builtins: Mapping[str, Function]

    def resolve(self, name: str) -> Function:
        """Return the built-in called ``name``, or else import it. Raises PlugPointError."""
        return self.builtins.get(name) or import_function(self.setting, name, self.builtins)  # type: ignore[return-value]
