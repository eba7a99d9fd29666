"""Applies the rules that stand beside the tables to a configuration."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from miles_spmd.config import parallel, parity, transformer_engine  # noqa: F401  (register their rules)
from miles_spmd.config.backends import BackendMissingError, backend_fields
from miles_spmd.config.config import Config
from miles_spmd.config.model import checkpoint_shape
from miles_spmd.config.rules import ERRORS, FILES, NOT_BY_DEFAULT, PARITY, WARNINGS, Settings, violations
from miles_spmd.config.table import Table


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
    for table in backends:
        for path in without:
            values.pop(path.removeprefix(f"{table}."), None)
    own = [(path, value) for path, value in _leaves(config) if not without or not _is_inside(path, without)]
    names = Counter(path[-1] for path, _ in own)
    values |= {".".join(path): value for path, value in own}
    return Settings(values | {path[-1]: value for path, value in own if names[path[-1]] == 1})


def _leaves(table: Table, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name in type(table).model_fields:
        value = getattr(table, name)
        if isinstance(value, Table):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _is_inside(path: tuple[str, ...], without: Collection[str]) -> bool:
    return any(".".join(path[:depth]) in without for depth in range(1, len(path) + 1))


def _known(config: Table, without: Collection[str] = ()) -> Settings:
    """The settings, and the ``shape`` of the checkpoint if it can be read."""
    values = settings(config, without=without)
    folder = values.get("hf_checkpoint")
    shape = checkpoint_shape(folder) if folder is not None else None
    return values if shape is None else Settings(values | {"shape": shape})


def errors(config: Table, *, world_size: int | None = None, without: Collection[str] = ()) -> list[str]:
    """Why this configuration cannot run. ``without`` names the settings that are known to have errors."""
    values = _known(config, without)
    if world_size is not None:
        values |= _sides(world_size, values.get("rollout_num_gpus"))
    return violations([*ERRORS, *(PARITY if values.get("parity") == "bitwise" else [])], values)


def missing_files(config: Table, *, without: Collection[str] = ()) -> list[str]:
    """Which checkpoint folders, data files and packages are missing."""
    return violations(FILES, _known(config, without))


def warnings(config: Table) -> list[str]:
    """What is allowed but probably not intended."""
    return violations(WARNINGS, _known(config))


def decide_parity(config: Config, capabilities: Collection[str] | None) -> tuple[Config, list[str]]:
    """``config`` with "bitwise" or "off" in the place of "auto", and the reasons why it is off. Parity that was not
    asked for ends no run: a mismatch is a warning then. ``capabilities``: of the GPUs to be used; None: not known."""
    if config.determinism.parity != "auto":
        return config, []
    values = _known(config)
    if capabilities is not None:
        values["capabilities"] = frozenset(capabilities)
    reasons = violations([*PARITY, *NOT_BY_DEFAULT], values)
    decided = (
        {"parity": "off"} if reasons else {"parity": "bitwise", "parity_gate": config.determinism.parity_gate or "warn"}
    )
    return config.model_copy(update={"determinism": config.determinism.model_copy(update=decided)}), reasons


def _sides(world_size: int, rollout_num_gpus: int | None) -> dict[str, int]:
    """The number of ranks, and of those that train and that generate where this is known and there are both."""
    sizes = {"world_size": world_size}
    if rollout_num_gpus is not None and rollout_num_gpus < world_size:
        sizes |= {"trainer_ranks": world_size - rollout_num_gpus, "engine_ranks": rollout_num_gpus or world_size}
    return sizes
