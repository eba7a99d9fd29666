"""Applies the rules of :mod:`miles_spmd.config.rules` to a configuration."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection
from typing import Any

from miles_spmd.config import (  # noqa: F401  (register themselves)
    algorithm_rules,
    determinism_rules,
    layout_rules,
    machine_rules,
    parity_expert_rules,
    parity_rules,
)
from miles_spmd.config.backends import BackendMissingError, backend_fields
from miles_spmd.config.rules import CONTRADICTIONS, DOUBTS, FILES, NOT_BY_DEFAULT, PARITY, Rule, checkpoint_shape
from miles_spmd.config.schema import Config, Table


def contradictions(config: Config, *, world_size: int | None = None, ignore: Collection[str] = ()) -> list[str]:
    """Why this configuration cannot run. ``ignore`` names leaves that are known to be faulty."""
    found = _apply(CONTRADICTIONS, config, world_size, ignore)
    if config.determinism.parity == "bitwise" and "parity" not in ignore:
        found += _apply(PARITY, config, world_size, ignore)
    return found


def decide_parity(config: Config, capabilities: Collection[str] | None) -> tuple[Config, list[str]]:
    """``config`` with "bitwise" or "off" in the place of "auto", and the reasons why it is off. What was not asked for
    ends no run: a mismatch is a warning then. ``capabilities``: of the GPUs that will be used; None: not known."""
    if config.determinism.parity != "auto":
        return config, []
    reasons = _apply([*PARITY, *NOT_BY_DEFAULT], config, None, (), capabilities)
    decided = (
        {"parity": "off"} if reasons else {"parity": "bitwise", "parity_gate": config.determinism.parity_gate or "warn"}
    )
    return config.model_copy(update={"determinism": config.determinism.model_copy(update=decided)}), reasons


def doubts(config: Config) -> list[str]:
    """What is allowed but probably not meant."""
    return _apply(DOUBTS, config, None, ())


def missing_files(config: Config, *, ignore: Collection[str] = ()) -> list[str]:
    """Checkpoint folders, data files and packages that are not there."""
    return _apply(FILES, config, None, ignore)


def _apply(
    rules: list[Rule],
    config: Config,
    world_size: int | None,
    ignore: Collection[str],
    capabilities: Collection[str] | None = None,
) -> list[str]:
    values = {name: value for name, value in settings(config).items() if name not in ignore}
    if world_size is not None:
        values |= _sides(world_size, values.get("rollout_num_gpus"))
    shape = None if "hf_checkpoint" in ignore else checkpoint_shape(config.model.hf_checkpoint)
    if shape is not None:
        values["shape"] = shape
    if capabilities is not None:
        values["capabilities"] = frozenset(capabilities)
    messages: list[str] = []
    for rule in rules:
        names = inspect.signature(rule).parameters
        if all(name in values for name in names):
            messages += rule(**{name: values[name] for name in names})
    return messages


def _sides(world_size: int, rollout_num_gpus: int | None) -> dict[str, int]:
    """How many ranks there are, and how many of them train and generate, where that is known and both do."""
    sizes = {"world_size": world_size}
    if rollout_num_gpus is not None and rollout_num_gpus < world_size:
        sizes |= {"trainer_ranks": world_size - rollout_num_gpus, "engine_ranks": rollout_num_gpus or world_size}
    return sizes


def settings(config: Config) -> dict[str, Any]:
    """Every leaf by its own name: ours, Megatron's and SGLang's, with the defaults of those that were not set."""
    values: dict[str, Any] = {}
    for table in ("sglang", "megatron"):
        with contextlib.suppress(BackendMissingError):
            values |= {name: field.default for name, field in backend_fields(table).items()}
    for table in ("megatron", "sglang"):  # `attention_backend` is a key of both, and ours to say of the engine's alone
        values |= getattr(config, table)
    for name in Config.model_fields:
        table = getattr(config, name)
        if isinstance(table, Table):
            values |= {leaf: getattr(table, leaf) for leaf in type(table).model_fields}
    return values
