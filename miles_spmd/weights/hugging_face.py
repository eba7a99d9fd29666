"""Hugging Face checkpoints: load only the slices that a rank holds; export from any layout."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from miles_spmd.models import (
    GENERATION,
    PADDING,
    Family,
    Piece,
    TensorLayout,
    load_family,
    read_config,
    read_generation_config,
)
from miles_spmd.models.export_folder import MANIFEST, foreign_files, is_begun, write_manifest
from miles_spmd.models.hf_config import end_tokens
from miles_spmd.models.layout import check_filled, region, whole
from miles_spmd.models.random import NO_WEIGHTS
from miles_spmd.models.rope import Rope
from miles_spmd.types.files import write_whole
from miles_spmd.weights.model_files import INDEX_FILE, HuggingFaceCheckpointError, find_tensors
from miles_spmd.weights.random_weights import random_slices
from miles_spmd.weights.refit import Refit
from miles_spmd.weights.transport import raise_together

SPECIAL_TOKENS = "special_tokens_map.json"
COPIED = {".json", ".jinja", ".model", ".tiktoken", ".txt"}  # of tokenizer, chat template, generation config
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@torch.no_grad()
def load(path: str | Path, weights: Mapping[str, torch.Tensor], layouts: list[TensorLayout], family: Family) -> None:
    """Fill ``weights`` in place with this rank's slices of the checkpoint in ``path``, cast to their dtypes.

    ``family`` is the model that ``weights`` belong to. A rank reads its own slices only, without collectives. A value
    head is set to zeros if the checkpoint, one of a policy, has none. A folder of ``random:`` has no safetensors: its
    weights are random, and equal for every layout.
    Raises HuggingFaceCheckpointError naming every missing or truncated file, missing tensor, wrong shape and tensor
    that the model does not have at once, before any weight has changed; ValueError when a layout does not fill its
    tensor.
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
            norm = 0.0 if family.zero_centred_norms else 1.0
            slices = random_slices(shapes, family.config.get("initializer_range", 0.02), device, norm)
        else:
            slices = _slices(Path(path), shapes, family, opened)
        for name, targets in places.items():
            if name not in slices:
                padding += targets
                continue
            for target, piece in targets:
                target.copy_(slices[name][region((), piece.start, piece.shape)])
    for target, _ in padding:
        target.zero_()


def read_whole(
    path: str | Path, weights: Mapping[str, torch.Tensor], layouts: list[TensorLayout], model: str | Path
) -> dict[str, torch.Tensor]:
    """Return this rank's slices of the checkpoint in ``path`` in host memory, by the names of ``weights`` and in their
    dtypes. Raises as :func:`load`, and ValueError for another model than that of the folder ``model``, and for weights
    that are not finite."""
    folder, family = Path(path), load_family(model)
    found = load_family(folder)
    own, other = (
        {"model_type": one.model_type, **one.transformer_config(), **one.gpt_model(), "rope": _ropes(one)}
        for one in (family, found)
    )
    if differing := [name for name in own if own[name] != other.get(name)]:
        text = ", ".join(f"{name} is {other.get(name)!r} there and {own[name]!r} here" for name in differing)
        raise HuggingFaceCheckpointError(folder, [f"its config.json is that of another model: {text}"])
    read = {name: torch.empty_like(weight, device="cpu") for name, weight in weights.items()}
    load(folder, read, layouts, family)
    if wrong := [name for name, weight in read.items() if not weight.isfinite().all()]:
        raise HuggingFaceCheckpointError(folder, [f"{name} has numbers that are not finite" for name in wrong])
    return read


def _ropes(family: Family) -> list[tuple[Rope | None, int]]:
    """Return the rotary positions of the layers, each with the number of successive layers that have them."""
    return [(rope, len(list(run))) for rope, run in groupby(layer.attention.rope for layer in family.layers)]


def _slices(folder: Path, names: Iterable[str], family: Family, opened: ExitStack) -> dict[str, Any]:
    """Return lazy slices of the tensors with these names; only a value head may be missing. ``opened`` closes the files
    that they are in. Raises HuggingFaceCheckpointError with all problems that were found."""
    file_of = find_tensors(folder, family)

    @cache
    def open_file(name: str) -> Any:
        return opened.enter_context(safe_open(folder / name, framework="pt"))

    if family.tied_embeddings and HEAD in file_of and EMBEDDING in file_of:
        head, embedding = (open_file(file_of[name]).get_tensor(name) for name in (HEAD, EMBEDDING))
        if not torch.equal(head, embedding):  # transformers does not tie them then
            problem = (
                f"{HEAD} differs from {EMBEDDING}, although tie_word_embeddings is true in config.json; set it to "
                f"false, or remove {HEAD}"
            )
            raise HuggingFaceCheckpointError(folder, [problem])
    return {name: open_file(file_of[name]).get_slice(name) for name in names if name in file_of}


def export(
    path: str | Path,
    weights: Mapping[str, torch.Tensor],
    layouts: list[TensorLayout],
    source_config_dir: str | Path,
    family: Family,
    *,
    dtype: torch.dtype | None = None,
    stop_token_ids: Sequence[int] = (),
    shard_bytes: int = 5 << 30,
    bucket_bytes: int = 256 << 20,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the model that the ranks of ``group`` hold together as a Hugging Face checkpoint folder, on its rank 0.

    All ranks call it. ``dtype`` is that of the files, by default that of the weights. The rest, and errors, as for
    :func:`export_tensors`; ValueError is raised on every rank.
    """
    shapes = family.checkpoint_tensors()

    def gather(tensors: dict[str, torch.Tensor], names: Sequence[str]) -> None:
        # A refit whose only receiver is rank 0, with a layout of whole checkpoint tensors.
        targets = [TensorLayout(name, whole(name, shapes[name])) for name in tensors]
        in_shard = set(names)
        sources = [layout for layout in layouts if not in_shard.isdisjoint(piece.name for piece in layout.pieces)]
        Refit(weights, sources, tensors, targets, bucket_bytes=bucket_bytes, group=group).run()

    def on_writer(function: Callable[..., None], *args: Any) -> None:
        """Call ``function`` on rank 0; where it fails, raise on all ranks."""
        raise_together(_problem(function, *args) if dist.get_rank(group) == 0 else "", group)

    dtype, writes = dtype or next(iter(weights.values())).dtype, dist.get_rank(group) == 0
    _export(path, source_config_dir, family, dtype, stop_token_ids, shard_bytes, writes, gather, on_writer)


def export_tensors(
    path: str | Path,
    read: Callable[[str, torch.Tensor], None],
    source_config_dir: str | Path,
    family: Family,
    *,
    dtype: torch.dtype,
    stop_token_ids: Sequence[int] = (),
    shard_bytes: int = 5 << 30,
) -> None:
    """Write a model as a Hugging Face checkpoint folder, in this process alone. ``read`` fills a tensor by its name.

    ``family`` is the model; its configuration and tokenizer files are copied from ``source_config_dir``. A model with a
    value head becomes one of transformers' sequence classifiers with one label. ``dtype`` is that of the files. Needs
    host memory for one shard of ``shard_bytes``. ``stop_token_ids`` end a response beside the model's own
    end-of-sequence tokens. The folder appears complete or not at all; an existing one is replaced if it is empty or an
    export. Raises ValueError where it cannot be written, and what ``read`` raises.
    """

    def read_all(tensors: dict[str, torch.Tensor], names: Sequence[str]) -> None:
        for name, tensor in tensors.items():
            read(name, tensor)

    def on_writer(function: Callable[..., None], *args: Any) -> None:
        if problem := _problem(function, *args):
            raise ValueError(problem)

    _export(path, source_config_dir, family, dtype, stop_token_ids, shard_bytes, True, read_all, on_writer)


def _export(
    path: str | Path,
    source_config_dir: str | Path,
    family: Family,
    dtype: torch.dtype,
    stop_token_ids: Sequence[int],
    shard_bytes: int,
    writes: bool,
    fill: Callable[[dict[str, torch.Tensor], Sequence[str]], None],
    on_writer: Callable[..., None],
) -> None:
    """Write shard by shard what ``fill`` puts into its tensors, where this process ``writes``; ``fill`` gets the names,
    too. ``on_writer`` calls a function in the process that writes, and raises ValueError where it fails."""
    folder, source = Path(path).resolve(), Path(source_config_dir)
    partial = folder.with_name(f".{folder.name}.partial")
    shapes = family.checkpoint_tensors()
    shards = split_state_dict_into_shards_factory(
        shapes,  # type: ignore[arg-type]  # it asks the function below about what would be tensors
        get_storage_size=lambda shape: prod(shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    try:
        on_writer(_begin, folder, partial, source, family, dtype, shards, stop_token_ids)
        for file, names in shards.filename_to_tensors.items():
            tensors = {name: torch.empty(shapes[name], dtype=dtype) for name in (names if writes else ())}
            fill(tensors, names)
            on_writer(_save, tensors, partial / file)
        on_writer(_publish, partial, folder)
    except BaseException:
        if writes and is_begun(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _problem(function: Callable[..., None], *args: Any) -> str:
    """Call ``function``; where it fails, say why."""
    try:
        function(*args)
    except OSError as error:
        return f"export failed: {error}"
    return ""


def _begin(
    folder: Path,
    partial: Path,
    source: Path,
    family: Family,
    dtype: torch.dtype,
    shards: StateDictSplit,
    stop_token_ids: Sequence[int],
) -> None:
    """Write everything except the weights into the folder ``partial``. Raises OSError."""
    if foreign := foreign_files(folder):
        raise FileExistsError(f"{folder} holds files that no export wrote or that were changed since: {foreign[0]}")
    if is_begun(partial):  # by an export that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write_manifest(partial)  # so that this folder is known as ours from its first moment
    for file in source.iterdir():
        if file.suffix in COPIED and not file.name.endswith(".index.json") and file.name != MANIFEST:
            shutil.copyfile(file, partial / file.name)
    config = family.engine_config() | read_config(source)
    name = str(dtype).removeprefix("torch.")
    config |= {"dtype": name} | ({"torch_dtype": name} if "torch_dtype" in config else {})
    if family.value_head:
        classifier = [
            name.replace("ForCausalLM", "ForSequenceClassification") for name in config.get("architectures", ())
        ]
        config |= {"architectures": classifier, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    generation = read_generation_config(source)
    if ends := [*dict.fromkeys([*end_of_sequence(source, config, generation), *stop_token_ids])]:
        # both, because engines read both: what is exported stops where training stopped
        config["eos_token_id"] = generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    _write_json(partial / "config.json", config)
    if generation:
        _write_json(partial / GENERATION, generation)
    if shards.is_sharded:
        _write_json(partial / INDEX_FILE, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def end_of_sequence(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """Return the tokens that end a response of the model in ``folder``: those of config.json, of generation_config.json
    and of the tokenizer, whichever of them the engine or the data take."""
    ends = end_tokens(config) + end_tokens(generation)
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokens = [_read_json(folder / name).get("eos_token") for name in ("tokenizer_config.json", SPECIAL_TOKENS)]
        token = next((token for token in tokens if token), None)
        text = token.get("content") if isinstance(token, dict) else token
        found = [tokenizer.token_to_id(text) if text else None, tokenizer.token_to_id("<|eom_id|>")]  # SGLang adds it
        ends += [id for id in found if id is not None]
    return ends


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(content, indent=2) + "\n").encode())


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """safetensors writes a file that its owner alone can read; it gets the mode that umask gives to the others."""
    try:
        save_file(tensors, file, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error
    file.chmod((file.parent / "config.json").stat().st_mode & 0o777)


def _publish(partial: Path, folder: Path) -> None:
    """Move ``partial`` to ``folder``, in the place of an earlier export. Raises OSError, FileExistsError when somebody
    has put files there since."""
    write_manifest(partial)
    if foreign := foreign_files(folder):
        raise FileExistsError(f"{folder} holds files that no export wrote or that were changed since: {foreign[0]}")
    replaced = folder.with_name(f".{folder.name}.replaced")
    if is_begun(replaced):
        shutil.rmtree(replaced)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
