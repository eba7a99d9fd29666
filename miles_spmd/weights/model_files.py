"""The safetensors files of a Hugging Face checkpoint, compared with their model by what their headers say.

Imports no torch: a run is examined before anything that takes time or memory starts.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from miles_spmd.models import VALUE_HEAD, Family

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_PROBLEMS = 20
_DTYPES = "F64", "F32", "F16", "BF16"  # other numbers are quantised, and mean nothing without their scales


class HuggingFaceCheckpointError(ValueError):
    """A Hugging Face checkpoint that cannot be loaded; the message has one line for each of its ``problems``."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        more = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        self.problems = [*problems[:MAX_PROBLEMS], *more]
        super().__init__("\n  ".join([f"checkpoint {folder} cannot be loaded:", *self.problems]))


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def find_tensors(folder: Path, family: Family) -> dict[str, str]:
    """Return the file of each tensor that the checkpoint in ``folder`` has, by the tensor's name; of those that the
    model needs only a value head may be missing.

    Raises HuggingFaceCheckpointError naming every missing or truncated file, missing tensor, wrong shape or dtype and
    tensor that the model does not have at once.
    """
    problems: list[str] = []
    with ExitStack() as opened:

        @cache
        def open_file(name: str) -> tuple[Any, set[str]]:
            """Return the file and the names of its tensors; None and no names if it cannot be opened."""
            try:
                file = opened.enter_context(safe_open(folder / name, framework="numpy"))
                return file, set(file.keys())
            except FileNotFoundError:
                problems.append(f"{name} is missing")
            except (SafetensorError, OSError) as error:
                problems.append(f"{name} is truncated or not a safetensors file: {error}")
            return None, set()

        file_of: dict[str, str] = {}
        if (folder / SINGLE_FILE).is_file():
            file_of = dict.fromkeys(open_file(SINGLE_FILE)[1], SINGLE_FILE)
        elif (folder / INDEX_FILE).is_file():
            try:
                file_of = msgspec.json.decode((folder / INDEX_FILE).read_bytes(), type=_Index).weight_map
            except msgspec.DecodeError as error:
                problems.append(f"{INDEX_FILE} is not a valid index: {error}")
        else:
            problems.append(f"neither {SINGLE_FILE} nor {INDEX_FILE} exists (other formats are not supported)")
        needed = family.checkpoint_tensors()
        for name, shape in () if problems else needed.items():
            if name not in file_of:
                if name != VALUE_HEAD:
                    problems.append(f"tensor {name} is missing")
                continue
            file, names = open_file(file_of[name])
            if name in names:
                found = file.get_slice(name)
                if tuple(actual := found.get_shape()) != shape:
                    problems.append(f"{file_of[name]}: {name} has shape {actual}, the model needs {list(shape)}")
                if (dtype := found.get_dtype()) not in _DTYPES:
                    problems.append(f"{file_of[name]}: {name} has dtype {dtype}; use the checkpoint in {_DTYPES[-1]}")
            elif file is not None:
                problems.append(f"{file_of[name]}: tensor {name} is missing, though the index lists it here")
        held = {name: file for file in dict.fromkeys(file_of.values()) for name in open_file(file)[1]}
        # Left out, they would change the model, and an export would lose them.
        problems += [
            f"{file_of.get(name) or held[name]}: the {family.model_type} model has no tensor {name}"
            for name in dict.fromkeys([*file_of, *held])
            if name not in needed and not family.is_ignored(name)
        ]
    if problems:
        raise HuggingFaceCheckpointError(folder, problems)
    return {name: file_of.get(name, file) for name, file in held.items()}
