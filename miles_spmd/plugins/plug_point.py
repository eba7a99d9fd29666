"""From the value of a setting to a function: a built-in by its name, or a user's as ``module:function``."""

import functools
import importlib
import inspect
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from miles_spmd.plugins.renamed import accept_old_names

Function = TypeVar("Function", bound=Callable[..., Any])
Call = TypeVar("Call", bound=Callable[..., Any])


class PlugPointError(ValueError):
    """A setting that names neither a built-in nor an importable function. The message gives setting, name and cause."""


class PlugInError(RuntimeError):
    """A user's function that raised, exited, or took too long. The message gives setting, name and cause."""


def import_function(setting: str, name: str, known: Iterable[str], protocol: type | None = None) -> Callable[..., Any]:
    """Import ``module:function`` (or ``module:Class.method``), which ``setting`` names.

    Raises PlugPointError if ``name`` has another form, in which case the built-ins ``known`` are listed, if the module
    or the attribute cannot be imported, if the attribute is not callable, and if it cannot be called as ``protocol``.
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
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` exits
        raise PlugPointError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(target):
        raise PlugPointError(f"{where} is of type {type(target).__name__}; it must be a function")
    if protocol is not None and (problem := _unlike(target, protocol)):
        raise PlugPointError(f"{where} {problem}")
    return target


def _unlike(function: Callable[..., Any], protocol: type) -> str:
    """Return why ``function`` cannot be called as ``protocol``, "" where it can. Parameters are given by their places,
    those that are keyword-only in the Protocol by their names."""
    (_, *expected) = inspect.signature(protocol.__call__).parameters.values()
    named = [one.name for one in expected if one.kind is one.KEYWORD_ONLY]
    placed = [one.name for one in expected if one.kind is not one.KEYWORD_ONLY]
    example = ", ".join([*placed, *(f"{name}=..." for name in named)])
    called = f"it is called as ({example}), see {protocol.__name__} in {protocol.__module__.replace('.', '/')}.py"
    if inspect.iscoroutinefunction(function):
        return f"is an `async def`, which is not awaited here; {called}"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function that is not written in Python
        return ""
    try:
        signature.bind(*placed, **dict.fromkeys(named))
    except TypeError as error:
        return f"has the parameters {signature}: {error}; {called}"
    return ""


@dataclass(frozen=True)
class PlugPoint(Generic[Function]):
    """A setting, such as ``algorithm.loss_type``, and the built-in functions that it can name."""

    setting: str
    builtins: Mapping[str, Function]
    protocol: type | None = None
    """What a user's function is called as."""
    limited: bool = True
    """Whether ``time_limit`` holds for calls."""
    time_limit: ClassVar[float] = 0.0
    """Seconds that a call of a user's function in this process's main thread may take; 0: whatever it takes. The
    controller sets it; a worker's calls are limited by the controller's deadlines."""

    def resolve(self, name: str) -> Function:
        """Return the built-in called ``name``, or else import it. Raises PlugPointError. Whatever an imported function
        raises becomes a PlugInError."""
        if name in self.builtins:
            return self.builtins[name]
        return self.guarded(name, import_function(self.setting, name, self.builtins, self.protocol))  # type: ignore[return-value]

    def guarded(self, name: str, function: Call) -> Call:
        """Return ``function``, which the setting has named or an object made that it has named, so that whatever it
        raises becomes a PlugInError."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with _explained(f"{self.setting} = {name!r}"), _limited(self.time_limit if self.limited else 0.0):
                return function(*arguments, **named)

        return call  # type: ignore[return-value]

    def returned(self, name: str, value: Any, expected: str) -> PlugInError:
        """Return the error of a user's function that has returned ``value`` in the place of what is ``expected``."""
        try:
            shown = f"{value!r:.200}"
        except Exception:
            shown = f"an object of the class {type(value).__name__}"
        return PlugInError(f"{self.setting} = {name!r} returned {shown}; it must return {expected}")


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except SystemExit as error:
        raise PlugInError(f"{where} called sys.exit({error.code!r})") from error
    except _Overdue as error:
        raise PlugInError(f"{where} took longer than deadlines.train_timeout = {error}") from error
    except Exception as error:
        raise PlugInError(f"{where} raised {type(error).__name__}: {error}") from error


class _Overdue(BaseException):
    """Raised inside a user's function that has taken too long. Not an Exception, which such a function may catch."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Interrupt the block after ``seconds`` (0: never), in the main thread, where alone that is possible."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_: object) -> None:
        raise _Overdue(f"{seconds:g} s")

    former = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
