"""Hugging Face checkpoints: load only the slices that a rank holds; export from any layout."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from miles_spmd.models import PADDING, VALUE_HEAD, Family, Piece, TensorLayout, read_config
from miles_spmd.models.layout import check_filled, region, whole
from miles_spmd.models.random import NO_WEIGHTS
from miles_spmd.weights.random_weights import random_slices
from miles_spmd.weights.refit import Refit
from miles_spmd.weights.transport import raise_together

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
COPIED = {".json", ".jinja", ".model", ".tiktoken", ".txt"}  # of tokenizer, chat template, generation config
MAX_PROBLEMS = 20


class HuggingFaceCheckpointError(ValueError):
    """A Hugging Face checkpoint that cannot be loaded; the message has one line for each problem."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        more = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        super().__init__("\n  ".join([f"checkpoint {folder} cannot be loaded:", *problems[:MAX_PROBLEMS], *more]))


@torch.no_grad()
def load(path: str | Path, weights: Mapping[str, torch.Tensor], layouts: list[TensorLayout], family: Family) -> None:
    """Fill ``weights`` in place with this rank's slices of the checkpoint in ``path``, cast to their dtypes.

    ``family`` is the model that ``weights`` belong to. A rank reads its own slices only, without collectives. A value
    head is set to zeros if the checkpoint, one of a policy, has none. A folder of ``random:`` has no safetensors: its
    weights are random, and equal for every layout.
    Raises HuggingFaceCheckpointError naming every missing or truncated file, missing tensor and wrong shape at once,
    before any weight has changed; ValueError when a layout does not fill its tensor.
    """
    places: dict[str, list[tuple[torch.Tensor, Piece]]] = defaultdict(list)
    for layout in layouts:
        local = weights[layout.local_name]
        check_filled(layout.local_name, tuple(local.shape), layout.pieces)
        for piece in layout.pieces:
            places[piece.name].append((local[region(piece.lead, piece.local, piece.shape)], piece))
    padding = places.pop(PADDING, [])
    with ExitStack() as opened:
        shapes = {name: family.checkpoint_tensors()[name] for name in places}
        if (Path(path) / NO_WEIGHTS).is_file():
            device = next(iter(weights.values())).device
            slices = random_slices(shapes, family.config.get("initializer_range", 0.02), device)
        else:
            slices = _slices(Path(path), shapes, opened)
        for name, targets in places.items():
            if name not in slices:
                padding += targets
                continue
            for target, piece in targets:
                target.copy_(slices[name][region((), piece.start, piece.shape)])
    for target, _ in padding:
        target.zero_()


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _slices(folder: Path, shapes: Mapping[str, tuple[int, ...]], opened: ExitStack) -> dict[str, Any]:
    """Return lazy slices of the tensors with these names; only a value head may be missing. ``opened`` closes the files
    that they are in. Raises HuggingFaceCheckpointError with all problems that were found."""
    problems: list[str] = []

    @cache
    def open_file(name: str) -> tuple[Any, set[str]]:
        """Return the file and the names of its tensors; None and no names if it cannot be opened."""
        try:
            file = opened.enter_context(safe_open(folder / name, framework="pt"))
            return file, set(file.keys())
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except SafetensorError as error:
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
    found = {}
    for name, shape in () if problems else shapes.items():
        if name not in file_of:
            if name != VALUE_HEAD:
                problems.append(f"tensor {name} is missing")
            continue
        file, names = open_file(file_of[name])
        if name in names:
            found[name] = file.get_slice(name)
            if tuple(actual := found[name].get_shape()) != shape:
                problems.append(f"{file_of[name]}: {name} has shape {actual}, the model needs {list(shape)}")
        elif file is not None:
            problems.append(f"{file_of[name]}: tensor {name} is missing, though the index lists it here")
    if problems:
        raise HuggingFaceCheckpointError(folder, problems)
    return found


def export(
    path: str | Path,
    weights: Mapping[str, torch.Tensor],
    layouts: list[TensorLayout],
    source_config_dir: str | Path,
    family: Family,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 << 30,
    bucket_bytes: int = 256 << 20,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the model that the ranks of ``group`` hold together as a Hugging Face checkpoint folder, on its rank 0.

    All ranks call it. ``family`` is the model; its configuration and tokenizer files are copied from
    ``source_config_dir``. A model with a value head becomes one of transformers' sequence classifiers with one label.
    ``dtype`` is that of the files, by default that of the weights. Rank 0 needs host memory for one shard of
    ``shard_bytes``. The folder appears complete or not at all; an existing one is replaced. Raises ValueError on every
    rank when rank 0 cannot write.
    """
    folder, source = Path(path), Path(source_config_dir)
    partial = folder.with_name(f".{folder.name}.partial")
    shapes = family.checkpoint_tensors()
    dtype = dtype or next(iter(weights.values())).dtype
    shards = split_state_dict_into_shards_factory(
        shapes,  # type: ignore[arg-type]  # it asks the function below about what would be tensors
        get_storage_size=lambda shape: prod(shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    _on_writer(group, _begin, partial, source, family, dtype, shards)
    for file, names in shards.filename_to_tensors.items():
        # A refit whose only receiver is rank 0, with a layout of whole checkpoint tensors.
        written = names if dist.get_rank(group) == 0 else []
        tensors = {name: torch.empty(shapes[name], dtype=dtype) for name in written}
        targets = [TensorLayout(name, whole(name, shapes[name])) for name in written]
        in_shard = set(names)
        sources = [layout for layout in layouts if not in_shard.isdisjoint(piece.name for piece in layout.pieces)]
        Refit(weights, sources, tensors, targets, bucket_bytes=bucket_bytes, group=group).run()
        _on_writer(group, save_file, tensors, partial / file, {"format": "pt"})
    _on_writer(group, _publish, partial, folder)


def _on_writer(group: dist.ProcessGroup | None, function: Callable[..., None], *args: Any) -> None:
    """Call ``function`` on rank 0; when it fails there, raise ValueError on all ranks."""
    problem = ""
    if dist.get_rank(group) == 0:
        try:
            function(*args)
        except (OSError, SafetensorError) as error:
            problem = f"export failed: {error}"
    raise_together(problem, group)


def _begin(partial: Path, source: Path, family: Family, dtype: torch.dtype, shards: StateDictSplit) -> None:
    """Write everything except the weights into the folder ``partial``."""
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, partial / file.name)
    config = read_config(source)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    if family.value_head:
        classifier = [
            name.replace("ForCausalLM", "ForSequenceClassification") for name in config.get("architectures", ())
        ]
        config |= {"architectures": classifier, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _publish(partial: Path, folder: Path) -> None:
    """Move ``partial`` to ``folder`` and delete what was there."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
