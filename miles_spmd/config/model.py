"""`[model]`: the checkpoints that a run starts from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ValidationInfo

from miles_spmd.config.checks import ERRORS, FILES, WARNINGS, Messages, Settings, checkpoint_shape, rule
from miles_spmd.config.table import NotEmpty, Table
from miles_spmd.models.hub import advice, is_hub_id, resolve_hub_id
from miles_spmd.models.random import NO_WEIGHTS, random_config, resolve


def _folder(folder: Path, info: ValidationInfo) -> Path:
    return resolve_hub_id(resolve(folder), download=bool(info.context and info.context["download"]))


Checkpoint = Annotated[Path, NotEmpty, AfterValidator(_folder)]


class ModelConfig(Table):
    hf_checkpoint: Checkpoint
    """Folder with config.json, tokenizer and safetensors that the run starts from. `random:qwen3-0.6b` (`-1.7b`, `-4b`,
    `-8b`, `-30b-a3b`, `random:qwen2.5-1.5b`, `random:llama-3.2-1b`) is a model of that shape with random weights. A
    model of the Hugging Face Hub (`Qwen/Qwen3-0.6B`) is taken from its cache, and downloaded into it unless
    HF_HUB_OFFLINE is set."""
    ref_load: Checkpoint | None = None
    """Checkpoint folder of the reference policy for KL terms and `dpo`; the default is `hf_checkpoint`."""
    critic_load: Checkpoint | None = None
    """Checkpoint folder of a policy or a reward model that the critic starts from; the default is `hf_checkpoint`."""
    teacher_load: Checkpoint | None = None
    """Checkpoint folder of the teacher of on-policy distillation. It may have any size but needs the same vocabulary.
    """
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter dtype of trainer and engine."""

    @property
    def checkpoints(self) -> list[Path]:
        folders = (self.hf_checkpoint, self.ref_load, self.critic_load, self.teacher_load)
        return [folder for folder in folders if folder is not None]


OTHERS = ("ref_load", "critic_load", "teacher_load")


@rule(ERRORS)
def _teacher(s: Settings) -> Messages:
    if s.mode == "rl" and s.opd_kl_coef and s.teacher_load is None:
        yield "model.teacher_load: algorithm.opd_kl_coef needs a teacher's checkpoint"


@rule(ERRORS)
def _other_models_fit(s: Settings) -> Messages:
    for name in OTHERS:
        folder = s[name]
        other = checkpoint_shape(folder) if folder is not None else None
        if other is None:
            continue
        # A reference runs in the policy's own network; any other model only has to share its tokens.
        keys = ("vocab_size",) if name != "ref_load" else ("vocab_size", "hidden_size", "num_hidden_layers")
        for key in keys:
            if other.get(key) != s.shape.get(key):
                yield f"model.{name}: {folder} has {key} {other.get(key)}, model.hf_checkpoint has {s.shape.get(key)}"


@rule(WARNINGS)
def _unused_models(s: Settings) -> Messages:
    rl = s.mode == "rl"
    if s.ref_load is not None and not (s.mode == "dpo" or (rl and (s.kl_coef or s.kl_loss_coef))):
        yield "model.ref_load: nothing uses the reference policy while kl_coef and kl_loss_coef are 0"
    if s.critic_load is not None and not (rl and s.advantage_estimator == "ppo"):
        yield "model.critic_load: only advantage_estimator = ppo has a critic"
    if s.teacher_load is not None and not (rl and s.opd_kl_coef):
        yield "model.teacher_load: nothing uses the teacher while opd_kl_coef is 0"


@rule(FILES)
def _checkpoint(s: Settings) -> Messages:
    yield from folder_errors("model.hf_checkpoint", s.hf_checkpoint)


@rule(FILES)
def _other_checkpoints(s: Settings) -> Messages:
    for name in OTHERS:
        if s[name] is not None:
            yield from folder_errors(f"model.{name}", s[name])


def folder_errors(setting: str, folder: Path) -> Messages:
    """Why no model can be loaded from ``folder``, which ``setting`` names."""
    if random_config(folder) is not None:
        return  # written when the run starts
    if not folder.is_dir():
        yield f"{setting}: no folder {folder}" + (f"; {advice(folder)}" if is_hub_id(folder) else "")
        return
    if checkpoint_shape(folder) is None:
        yield f"{setting}: {folder} has no readable config.json"
    if not any(folder.glob("*.safetensors")) and not (folder / NO_WEIGHTS).is_file():
        yield f"{setting}: {folder} has no safetensors files"
