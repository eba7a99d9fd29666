"""Models of ``random:``: the same weights in every layout, of the size that a new model has."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from miles_spmd.config.load import ConfigError, dump_config, load_config
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.models import load_family
from miles_spmd.models.random import NO_WEIGHTS, SHAPES, random_config, write_random_checkpoints
from miles_spmd.weights import random_weights
from miles_spmd.weights.hugging_face import load
from miles_spmd.weights.random_weights import random_slices
from tests.models import tiny
from tests.models.parallel import Trainer, trainer_rank
from tests.models.random_checkpoint import random_checkpoint
from tests.ranks import Ranks


@pytest.mark.parametrize(
    ("shape", "parameters"),  # as their model cards count them
    [
        ("qwen3-0.6b", 0.6e9),
        ("qwen3-1.7b", 1.7e9),
        ("qwen3-4b", 4.0e9),
        ("qwen3-8b", 8.2e9),
        ("qwen3-30b-a3b", 30.5e9),
        ("qwen2.5-1.5b", 1.54e9),
        ("llama-3.2-1b", 1.23e9),
    ],
)
def test_shapes_are_the_published_ones(shape: str, parameters: float, tmp_path: Path) -> None:
    family = load_family(random_checkpoint(f"random:{shape}", tmp_path))
    assert family.num_parameters() == pytest.approx(parameters, rel=0.02)


def test_some_of_the_layers(tmp_path: Path) -> None:
    whole, part = (load_family(random_checkpoint(f"random:qwen3-30b-a3b{end}", tmp_path)) for end in ("", "/2"))
    assert part.num_layers == 2
    assert part.checkpoint_tensors().items() <= whole.checkpoint_tensors().items()
    with pytest.raises(ValueError, match="'two' is not a number of layers"):
        random_checkpoint("random:qwen3-30b-a3b/two", tmp_path)


def test_transformers_knows_the_folder(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    for shape in SHAPES:
        folder = random_checkpoint(f"random:{shape}", tmp_path)
        assert AutoConfig.from_pretrained(folder).vocab_size == SHAPES[shape]["vocab_size"]
    text = "Žluťoučký <b>kůň</b>\n\t7"
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode(text) == theirs(text)["input_ids"]
    message = [{"role": "user", "content": "7"}]
    rendered = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert ours.render(message) == rendered == "<|im_start|>user\n7<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "where"), [("qwen3", Trainer(tp=2)), ("qwen3-tied", Trainer(pp=2)), ("qwen3_moe", Trainer(tp=2, ep=2))]
)
def test_every_layout_gets_the_same_weights(ranks: Ranks, name: str, where: Trainer, tmp_path: Path) -> None:
    ranks.run(2, is_cut_from_one_model, tiny.checkpoint(name), where, tmp_path)


def is_cut_from_one_model(original: Path, where: Trainer, folder: Path) -> None:
    """What a rank makes up for its slices is what it would cut out of the whole model."""
    family = load_family(original)
    (folder / NO_WEIGHTS).touch()
    slices = random_slices(family.checkpoint_tensors(), family.config["initializer_range"], torch.device("cpu"))
    state = {name: tensor[tuple(slice(0, size) for size in tensor.shape)] for name, tensor in slices.items()}
    expected, layouts = trainer_rank(family, state, where)
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    load(folder, weights, layouts, family)
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def test_weights_are_those_of_a_new_model(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a.weight": (300, 500), "b.weight": (500, 300), "norm.weight": (7,), "b.bias": (7,)}
    slices = random_slices(shapes, 0.02, torch.device("cpu"))
    whole = {name: slices[name][tuple(slice(0, size) for size in shape)] for name, shape in shapes.items()}
    assert whole["norm.weight"].tolist() == [1.0] * 7
    assert whole["b.bias"].tolist() == [0.0] * 7
    a, b = whole["a.weight"].flatten(), whole["b.weight"].flatten()
    for values in (a, b):
        assert abs(values.mean()) < 5 * 0.02 / math.sqrt(len(values))
        assert values.std() == pytest.approx(0.02, rel=0.01)
        assert len(values.unique()) > 0.99 * len(values)
        neighbours = torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]
        assert abs(neighbours) < 5 / math.sqrt(len(values))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(len(a))
    monkeypatch.setattr(random_weights, "CHUNK", 1234)  # parts of rows that do not divide the tensor
    assert torch.equal(slices["a.weight"][0:300, 100:500], whole["a.weight"][:, 100:])


def test_a_recipe_may_name_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe, data = tmp_path / "recipe.toml", tmp_path / "data.jsonl"
    data.touch()
    recipe.write_text(f'[model]\nhf_checkpoint = "random:qwen3-4b"\n[data]\nprompt_data = "{data}"\n')
    config = load_config(recipe)
    folder = config.model.hf_checkpoint
    assert load_family(folder).hidden_size == 2560
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "recipe.toml"]  # reading writes nothing
    written = tmp_path / "written.toml"
    written.write_text(dump_config(config))
    assert load_config(written) == config
    write_random_checkpoints(config.model.checkpoints)
    assert json.loads((folder / "config.json").read_text()) == random_config(folder)
    assert (folder / NO_WEIGHTS).is_file()
    with pytest.raises(ConfigError) as error:
        load_config(recipe, ["hf_checkpoint=random:qwen3-5b"])
    (message,) = error.value.errors
    assert message.startswith("model.hf_checkpoint: random:qwen3-5b: no such shape, did you mean random:qwen3-")
    assert "qwen3-30b-a3b" in message
