"""Model families: from a Hugging Face config to Megatron-core arguments and weight layouts. Imports no torch."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from miles_spmd.models.families import FAMILIES
from miles_spmd.models.family import VALUE_HEAD, Family
from miles_spmd.models.hf_config import end_tokens
from miles_spmd.models.layout import PADDING, Piece, TensorLayout
from miles_spmd.models.random import random_config

__all__ = [
    "FAMILIES",
    "GENERATION",
    "PADDING",
    "VALUE_HEAD",
    "Family",
    "Piece",
    "TensorLayout",
    "load_family",
    "read_config",
    "read_generation_config",
]

GENERATION = "generation_config.json"


def load_family(source: str | Path | dict[str, Any], *, value_head: bool = False) -> Family:
    """Return the family of a checkpoint folder, or of the contents of its ``config.json``; see :class:`Family`.

    Raises FileNotFoundError when the folder has no config.json, ValueError when the model or one of its features is
    not supported; the message names those that are.
    """
    config = source if isinstance(source, dict) else read_config(Path(source))
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        raise ValueError(
            f"model_type {model_type!r} is not supported{f', the nearest is {near[0]!r}' if near else ''} (supported: "
            f"{', '.join(sorted(FAMILIES))}); docs/models.md says how a family is added"
        )
    try:
        return FAMILIES[model_type](config, value_head=value_head)
    except ValueError as error:
        raise error if isinstance(source, dict) else ValueError(f"{source}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of ``config.json`` in a checkpoint folder, which for a random model need not exist yet.

    Raises FileNotFoundError, ValueError.
    """
    if (random := random_config(folder)) is not None:
        return random
    file = folder / "config.json"
    if not file.is_file():
        reason = "no such folder" if not folder.is_dir() else "the folder has no config.json"
        raise FileNotFoundError(f"{folder} is not a Hugging Face checkpoint: {reason}")
    return _read_object(file)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the contents of ``generation_config.json`` in a checkpoint folder, nothing where there is none.

    Raises ValueError.
    """
    file = folder / GENERATION
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    """Raises ValueError for other contents than a JSON object, and for malformed end-of-sequence tokens in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    if not all(type(token) is int for token in end_tokens(content)):
        ends = content["eos_token_id"]
        raise ValueError(f"{file}: eos_token_id must be a token's number or a list of them, not {ends!r}")
    return content
