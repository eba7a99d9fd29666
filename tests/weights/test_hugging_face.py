"""Checkpoints written by transformers, cut up by hand-made Megatron ranks, exported and read by transformers again."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from miles_spmd.models import TensorLayout, load_family
from miles_spmd.models.layout import whole
from miles_spmd.weights.hugging_face import export, load
from miles_spmd.weights.model_files import HuggingFaceCheckpointError
from tests.models import tiny
from tests.models.parallel import Trainer, trainer_rank
from tests.ranks import Ranks


def rank_of(folder: Path, where: Trainer, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[TensorLayout]]:
    """Empty tensors of this rank, with the shapes that hand-cut ones have."""
    cut, layouts = trainer_rank(load_family(folder), read(folder), where)
    return {name: torch.full_like(tensor, torch.nan, dtype=dtype) for name, tensor in cut.items()}, layouts


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load_and_export(source: Path, target: Path, where: Trainer, dtype: torch.dtype, options: dict) -> None:
    weights, layouts = rank_of(source, where, dtype)
    load(source, weights, layouts, load_family(source))
    expected, _ = trainer_rank(load_family(source), read(source), where)
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name].to(dtype)), name
    export(target, weights, layouts, source, load_family(source), **options)


def assert_same(exported: Path, original: Path) -> None:
    assert {p.name for p in exported.parent.iterdir() if p.name.startswith(".")} == set()
    before, after = read(original), read(exported)
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("world", "name", "where"),
    [
        (1, "qwen3", Trainer()),
        (2, "qwen3-tied", Trainer(pp=2)),
        (2, "qwen2", Trainer(tp=2)),
        (2, "qwen3_moe", Trainer(ep=2)),
        (4, "llama", Trainer(tp=4)),
        (4, "qwen3_moe", Trainer(tp=2, pp=2, vpp=2, ep=2)),
    ],
)
def test_round_trip_is_bitwise(
    ranks: Ranks, tmp_path: Path, world: int, name: str, where: Trainer, dtype: torch.dtype
) -> None:
    source = tmp_path / "source"
    model = tiny.save(source, name, dtype, max_shard_size="20KB" if world > 1 else "1GB")
    (source / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_text("must not be copied")
    assert (source / "model.safetensors.index.json").exists() == (world > 1)
    target = tmp_path / "out" / "export"
    ranks.run(world, load_and_export, source, target, where, dtype, {"shard_bytes": 50_000, "bucket_bytes": 4096})
    assert_same(target, source)
    assert len(list(target.glob("*.safetensors"))) > 1
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (target / "pytorch_model.bin").exists()
    assert (target / "generation_config.json").exists()
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert reloaded.dtype == dtype
    for key, value in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[key], value), key


def test_export_in_another_dtype_over_an_older_export(ranks: Ranks, tmp_path: Path) -> None:
    source, target = tiny.checkpoint("qwen3"), tmp_path / "export"
    ranks.run(1, load_and_export, source, target, Trainer(), torch.float32, {"shard_bytes": 50_000})
    assert len(list(target.glob("*.safetensors"))) > 1
    ranks.run(1, load_and_export, source, target, Trainer(), torch.float32, {"dtype": torch.bfloat16})
    assert sorted(file.name for file in target.glob("*.safetensors*")) == ["model.safetensors"]
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    original = read(source)
    for name, tensor in read(target).items():
        assert torch.equal(tensor, original[name].bfloat16()), name


def export_error(source: Path, target: Path) -> str:
    weights, layouts = rank_of(source, Trainer(tp=2), torch.float32)
    with pytest.raises(ValueError, match="export failed") as raised:
        export(target, weights, layouts, source, load_family(source))
    return str(raised.value)


def test_a_failing_write_stops_every_rank_and_leaves_the_older_export(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in ranks.run(2, export_error, tiny.checkpoint("qwen2"), tmp_path / "file" / "export"):
        assert str(tmp_path / "file") in message


@pytest.mark.parametrize("kind", ["notes", "folder", "edited", "trained", "link", "strangers"])
def test_what_an_export_did_not_write_is_kept(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    source, target = tiny.checkpoint("qwen3"), tmp_path / "export"
    if kind != "strangers":
        ranks.run(1, load_and_export, source, target, Trainer(), torch.float32, {})
    target.mkdir(exist_ok=True)
    match kind:
        case "folder":
            (target / "other").mkdir()
        case "edited":
            (target / "generation_config.json").write_text("{}")
        case "trained":  # further, by another program: as many bytes
            weights = target / "model.safetensors"
            weights.write_bytes(bytes(reversed(weights.read_bytes())))
        case "link":
            (target / "elsewhere").symlink_to(source)
        case _:
            (target / "notes.txt").write_text("mine")
    before = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    for message in ranks.run(2, export_error, source, target):
        assert "holds files that no export wrote or that were changed since" in message
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == before
    assert {file.name for file in tmp_path.iterdir()} == {"export"}


def test_an_export_through_a_link_replaces_where_it_leads(ranks: Ranks, tmp_path: Path) -> None:
    source = tiny.checkpoint("qwen3")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        ranks.run(1, load_and_export, source, tmp_path / "link", Trainer(), torch.float32, {})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert {file.name for file in tmp_path.iterdir()} == {"link", "real"}


def test_an_export_that_was_killed_is_written_anew(ranks: Ranks, tmp_path: Path) -> None:
    source, target = tiny.checkpoint("qwen3"), tmp_path / "export"
    ranks.run(1, load_and_export, source, target, Trainer(), torch.float32, {})
    target.rename(tmp_path / ".export.partial")
    (tmp_path / ".export.partial" / "model.safetensors").write_bytes(b"half")
    ranks.run(1, load_and_export, source, target, Trainer(), torch.float32, {})
    assert_same(target, source)


def test_an_export_that_was_killed_before_its_first_file_is_written_anew(ranks: Ranks, tmp_path: Path) -> None:
    source, target = tiny.checkpoint("qwen3"), tmp_path / "export"
    (tmp_path / ".export.partial").mkdir()
    (tmp_path / ".export.partial" / ".export_manifest.json").write_text("half")
    ranks.run(1, load_and_export, source, target, Trainer(), torch.float32, {})
    assert_same(target, source)
    assert {file.name for file in tmp_path.iterdir()} == {"export"}


@pytest.mark.parametrize(("limit", "file"), [(20, "export_manifest.json"), (20_000, "model.safetensors")])
def test_an_export_on_a_full_disk_names_the_file_and_leaves_nothing(
    ranks: Ranks, tmp_path: Path, limit: int, file: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny.checkpoint("qwen3"), source)
    messages = ranks.run(2, export_error_with_small_files, source, tmp_path / "export", limit)
    for message in messages:
        assert f"{tmp_path}/.export.partial/{file}" in message
        assert "File too large" in message
    assert {entry.name for entry in tmp_path.iterdir()} == {"source"}


def export_error_with_small_files(source: Path, target: Path, limit: int) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        return export_error(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_everybody_may_read_what_umask_lets_them(ranks: Ranks, tmp_path: Path) -> None:
    options = {"shard_bytes": 50_000}
    ranks.run(1, export_under_umask, tiny.checkpoint("qwen3"), tmp_path / "export", options)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "export").iterdir()} == {0o640}
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o750


def export_under_umask(source: Path, target: Path, options: dict) -> None:
    before = os.umask(0o027)
    try:
        load_and_export(source, target, Trainer(), torch.float32, options)
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "stop", "expected"),
    [
        (1, 2, "<three>", [], [1, 2, 3]),
        (None, [2, 1], None, [], [2, 1]),
        (1, None, "<one>", [], 1),
        ([1, 2], [2, 1], "<two>", [7], [1, 2, 7]),
        (None, None, {"content": "<three>"}, [], 3),
        (None, None, None, [], None),
    ],
)
def test_an_export_stops_where_training_stopped(
    config: object, generation: object, tokenizer: object, stop: list, expected: object, ranks: Ranks, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models

    source, target = tmp_path / "source", tmp_path / "export"
    shutil.copytree(tiny.checkpoint("qwen2"), source)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"eos_token_id": config, "torch_dtype": "float32"}))
    (source / "generation_config.json").unlink()
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    vocabulary = {"<zero>": 0, "<one>": 1, "<two>": 2, "<three>": 3}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<zero>")).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer}))
    options = {"dtype": torch.bfloat16, "stop_token_ids": stop}
    ranks.run(1, load_and_export, source, target, Trainer(), torch.float32, options)
    exported = json.loads((target / "config.json").read_text())
    assert exported["dtype"] == exported["torch_dtype"] == "bfloat16"
    assert exported["eos_token_id"] == expected
    if expected is None:
        assert not (target / "generation_config.json").exists()
    else:
        assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == expected
    assert transformers.AutoConfig.from_pretrained(target).eos_token_id == expected


# ---- what a damaged folder gets ----

NORM, HEAD, QUERY = "model.norm.weight", "lm_head.weight", "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny.save(tmp_path / "model", "qwen2", max_shard_size="20KB")
    return tmp_path / "model"


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def rewrite(folder: Path, name: str, tensor: Tensor | None) -> str:
    """Replace (None: drop) one tensor in its shard; the shard's name."""
    file = index_of(folder)[name]
    tensors = load_file(folder / file)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / file)
    return file


def load_error(folder: Path) -> str:
    """What loading the whole model says. Nothing may have been written."""
    family = load_family(folder)
    weights = {name: torch.full(shape, torch.nan) for name, shape in family.checkpoint_tensors().items()}
    layouts = [TensorLayout(name, whole(name, tuple(tensor.shape))) for name, tensor in weights.items()]
    with pytest.raises(HuggingFaceCheckpointError) as raised:
        load(folder, weights, layouts, family)
    assert all(tensor.isnan().all() for tensor in weights.values())
    assert str(folder) in str(raised.value)
    return str(raised.value)


def test_every_fault_of_a_checkpoint_is_named_at_once(sharded: Path) -> None:
    index = index_of(sharded)
    wrong = rewrite(sharded, NORM, torch.ones(33))
    dropped = rewrite(sharded, QUERY, None)
    gone = index["model.embed_tokens.weight"]
    (sharded / gone).unlink()
    short = index["model.layers.0.mlp.up_proj.weight"]
    assert len({wrong, dropped, gone, short}) == 4
    (sharded / short).write_bytes((sharded / short).read_bytes()[:-100])
    index.pop("model.layers.3.mlp.down_proj.weight")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    message = load_error(sharded)
    assert f"{wrong}: {NORM} has shape [33], the model needs [32]" in message
    assert f"{dropped}: tensor {QUERY} is missing, though the index lists it here" in message
    assert f"{gone} is missing" in message
    assert f"{short} is truncated or not a safetensors file" in message
    assert "tensor model.layers.3.mlp.down_proj.weight is missing" in message
    assert len(message.splitlines()) == 6


def test_only_the_first_faults_are_spelled_out(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: index_of(sharded)[NORM]}}))
    message = load_error(sharded)
    assert len(message.splitlines()) == 22
    assert message.endswith(f"and {len(load_family(sharded).checkpoint_tensors()) - 1 - 20} more")


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": []}'])
def test_a_broken_index(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json is not a valid index" in load_error(sharded)


def test_a_truncated_single_file_and_no_weights_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.checkpoint("qwen3"), folder)
    file = folder / "model.safetensors"
    for size in (len(file.read_bytes()) - 1, 4, 0):
        file.write_bytes(file.read_bytes()[:size])
        assert "model.safetensors is truncated or not a safetensors file" in load_error(folder)
    file.unlink()
    (folder / "pytorch_model.bin").write_text("")
    assert "neither model.safetensors nor model.safetensors.index.json exists" in load_error(folder)


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    """As when the reference policy is another model than the one that is trained."""
    family = load_family(tiny.checkpoint("qwen3"))
    weights = {"norm": torch.ones(32)}
    config = json.loads((tiny.checkpoint("qwen3") / "config.json").read_text()) | {"hidden_size": 16}
    other = load_family(config)
    with pytest.raises(HuggingFaceCheckpointError, match=r"embed_tokens.weight has shape \[97, 32\], the model needs"):
        load(tiny.checkpoint("qwen3"), weights, [TensorLayout("norm", whole(NORM, (32,)))], other)
    with pytest.raises(ValueError, match=r"norm of shape .* is filled in 16 of its 32 elements"):
        load(tiny.checkpoint("qwen3"), weights, [TensorLayout("norm", whole(NORM, (16,)))], family)


def test_tied_checkpoints_may_hold_the_head_too(tmp_path: Path) -> None:
    """transformers ties them only if the tensors are equal."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.checkpoint("qwen3-tied"), folder)
    tensors = read(folder)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {HEAD: embedding.clone()}, folder / "model.safetensors")
    family, weights = load_family(folder), {"output_layer.weight": torch.empty(97, 32)}
    pieces = family.megatron_layout("output_layer.weight", (97, 32), tp_rank=0, tp_size=1)
    load(folder, weights, [TensorLayout("output_layer.weight", pieces)], family)
    assert torch.equal(weights["output_layer.weight"], embedding)
    save_file(tensors | {HEAD: embedding + 1}, folder / "model.safetensors")
    assert "lm_head.weight differs from model.embed_tokens.weight" in load_error(folder)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.bias"),
        ("llama", "model.layers.4.input_layernorm.weight"),
        ("qwen2", "model.layers.0.self_attn.o_proj.bias"),
        ("qwen3", "model.layers.0.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.shared_expert.gate_proj.weight"),
        ("qwen3-tied", "score.weight"),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_tensors_that_the_model_does_not_have(name: str, extra: str, shards: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.save(folder, name, max_shard_size="20KB" if shards else "1GB")
    file = "extra.safetensors" if shards else "model.safetensors"
    held = {} if shards else load_file(folder / file)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"  # of older checkpoints, and without effect
    save_file(held | {extra: torch.ones(32), buffer: torch.ones(4)}, folder / file)
    if shards:
        index = index_of(folder) | {buffer: file}  # but not the extra tensor
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    message = load_error(folder)
    assert f"{file}: the {load_family(folder).model_type} model has no tensor {extra}" in message
    assert len(message.splitlines()) == 2
