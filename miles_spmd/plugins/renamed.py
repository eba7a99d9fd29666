"""Old names of ours in users' plug-ins: accepted for one version, each with a warning that gives the new name.

Nothing of this exists before the first plug-in is imported, so our own code cannot come to depend on an old name.
"""

import importlib
import sys
import warnings
from functools import cache, partial
from types import ModuleType
from typing import Any

from miles_spmd.types.rollout_batch import RolloutBatch

# Old module -> the modules that have its names now.
MODULES = {
    "miles_spmd.algorithms.gae": ("miles_spmd.algorithms.advantages",),
    "miles_spmd.algorithms.group_relative": ("miles_spmd.algorithms.advantages",),
    "miles_spmd.algorithms.mismatch": ("miles_spmd.algorithms.corrections",),
    "miles_spmd.algorithms.preference": ("miles_spmd.algorithms.losses",),
    "miles_spmd.algorithms.protocols": ("miles_spmd.plugins.algorithm", "miles_spmd.plugins.plug_point"),
    "miles_spmd.algorithms.rollout_batch": ("miles_spmd.types.rollout_batch",),
    "miles_spmd.algorithms.surrogates": ("miles_spmd.algorithms.losses",),
    "miles_spmd.algorithms.token_batch": ("miles_spmd.types.token_batch",),
    "miles_spmd.config.schema": ("miles_spmd.config", "miles_spmd.config.table"),
    "miles_spmd.data.preferences": ("miles_spmd.data.examples",),
    "miles_spmd.data.sample": ("miles_spmd.types.sample", "miles_spmd.types.train_sequence"),
    "miles_spmd.data.seeds": ("miles_spmd.types.seeds",),
    "miles_spmd.data.sft": ("miles_spmd.data.dataset", "miles_spmd.data.examples"),
    "miles_spmd.rewards.protocols": ("miles_spmd.plugins.reward",),
    "miles_spmd.rollout": (),
    "miles_spmd.rollout.engine": ("miles_spmd.types.request", "miles_spmd.generation.engine"),
}
# Old module and name -> the name that it has now, in one of those above.
NAMES = {"miles_spmd.algorithms.rollout_batch.Rollouts": "RolloutTable"}
_TABLES = "Algorithm Checkpoint Data Deadlines Determinism Eval Model Refit Reward Rollout Run Telemetry Train"
NAMES |= {f"miles_spmd.config.schema.{name}": f"{name}Config" for name in _TABLES.split()}


@cache
def accept_old_names() -> None:
    """From now on, imports of old names succeed and raise a DeprecationWarning in the importing line."""
    if not sys.warnoptions:  # Python hides DeprecationWarning outside of __main__, where no plug-in is
        warnings.filterwarnings("default", ".* is accepted for one more version", DeprecationWarning)
    for name in MODULES:
        sys.modules[name] = module = ModuleType(name)
        module.__dict__["__getattr__"] = partial(_find, name)
        parent, _, last = name.rpartition(".")
        setattr(importlib.import_module(parent), last, module)
    RolloutBatch.kl_penalties = _kl_penalties  # type: ignore[attr-defined]


def _find(old: str, name: str) -> Any:
    """Return what ``old.name`` is called now. Raises AttributeError if nothing has that name."""
    new_name = NAMES.get(f"{old}.{name}", name)
    for module in () if name.startswith("__") else MODULES[old]:  # which inspect looks up in every module
        names = vars(importlib.import_module(module))
        if new_name in names:
            _warn(f"{old}.{name}", f"{module}.{new_name}")
            return names[new_name]
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


def _kl_penalties(batch: RolloutBatch, algorithm: Any) -> Any:
    new_module = "miles_spmd.algorithms.kl"
    _warn("RolloutBatch.kl_penalties(algorithm)", f"{new_module}.kl_penalties(batch, algorithm)")
    return importlib.import_module(new_module).kl_penalties(batch, algorithm)


def _warn(old: str, new: str) -> None:
    message = f"{old} is now {new}; the old name is accepted for one more version"
    warnings.warn(message, DeprecationWarning, stacklevel=3)  # in the line that imports or calls
