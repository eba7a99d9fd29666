"""What a run reads, examined before anything starts: models, data, plug-ins and the checkpoint to begin from.

Errors of settings are found in ``config``; these are errors of what settings name. All are collected, so that a user
reads them in one list with those of the settings.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from miles_spmd.config import Config, RewardTerm
from miles_spmd.config.checks import Settings, settings
from miles_spmd.config.environment import SINGLE_TURN
from miles_spmd.config.judge import JudgeArguments
from miles_spmd.config.serve import JOB
from miles_spmd.controller.checkpoint_folders import ResumeError, newest, read
from miles_spmd.controller.datasets import Datasets
from miles_spmd.data.dataset import DataError, parse_slice, read_rows
from miles_spmd.data.tokenizer import Tokenizer, TokenizerError
from miles_spmd.environments.process import load_environment
from miles_spmd.environments.sessions.listener import LOOPBACK, listen
from miles_spmd.generation.engine import EngineFactory
from miles_spmd.models import load_family, read_generation_config
from miles_spmd.plugins.algorithm import (
    AdvantageEstimator,
    Aggregation,
    CorrectionFunction,
    GroupFilter,
    RewardPostProcess,
    SampleFilter,
    Surrogate,
)
from miles_spmd.plugins.data import Acceptor, Curriculum
from miles_spmd.plugins.environment import LeafSelector
from miles_spmd.plugins.plug_point import PlugInError, PlugPointError, import_function
from miles_spmd.plugins.reward import JudgeReader
from miles_spmd.plugins.run import Evaluator, Exporter, PhaseHook, TrackerFactory
from miles_spmd.plugins.training import Packer, TrainerHook
from miles_spmd.rewards.adapters import missing_columns
from miles_spmd.rewards.functions import load_reward
from miles_spmd.types.sample import Prompt
from miles_spmd.weights.model_files import HuggingFaceCheckpointError, find_tensors

EXAMINED_ROWS = 1000  # of each file; the run itself examines all when it starts
PROTOCOLS: Mapping[str, type] = {
    "run.phase_hook": PhaseHook,
    "data.curriculum": Curriculum,
    "rollout.engine": EngineFactory,
    "environment.trained_leaves": LeafSelector,
    "rollout.acceptance": Acceptor,
    "algorithm.reward_post_process": RewardPostProcess,
    "algorithm.dynamic_sampling_filter": GroupFilter,
    "algorithm.sample_filter": SampleFilter,
    "algorithm.advantage_estimator": AdvantageEstimator,
    "algorithm.loss_type": Surrogate,
    "algorithm.loss_aggregation": Aggregation,
    "algorithm.tis_function": CorrectionFunction,
    "reward.judge_reader": JudgeReader,
    "train.packing": Packer,
    "train.trainer_hook": TrainerHook,
    "eval.evaluator": Evaluator,
    "checkpoint.exporter": Exporter,
    "telemetry.tracker": TrackerFactory,
}


def errors(config: Config, without: Collection[str] = (), *, task: str = "train") -> list[str]:
    """Return what is wrong with the files and functions that ``config`` names, except for settings and tables whose
    dotted paths are in ``without``."""
    known = settings(config, without=without)
    messages = [*_models(known), *_judge(known), *_checkpoint(config, known, task), *_plug_ins(known)]
    tokenizer = None
    folder = known.get("hf_checkpoint")
    if folder is not None and not any(_concerns_data(path) for path in without) and _is_supported(folder):
        try:
            tokenizer = Tokenizer(folder) if (folder / "config.json").is_file() else None
        except TokenizerError as error:
            messages.append(f"model.hf_checkpoint: {error}")
    if task == "serve":
        return [*messages, *_listens(known)]
    return messages if tokenizer is None else messages + list(_data(config, tokenizer, task))


def _listens(known: Settings) -> Iterator[str]:
    """What keeps a server from listening on this machine."""
    host, port = known.get("serve_host"), known.get("serve_port")
    if host is None or port is None:
        return  # reported with the settings
    try:
        listen(LOOPBACK if host == JOB else host, port).close()
    except OSError as error:
        setting = "serve_port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "serve_host"
        yield f"serve.{setting}: cannot listen at {host}, port {port}: {error.strerror or error}; take another one"


def _models(known: Settings) -> Iterator[str]:
    for name in ("hf_checkpoint", "ref_load", "critic_load", "teacher_load"):
        value_head = name == "critic_load" or known.get("run.mode") == "rm"
        yield from _model(f"model.{name}", known.get(name), value_head)
    yield from _model("second_policy.second_hf_checkpoint", known.get("second_hf_checkpoint"))


def _model(setting: str, folder: Path | None, value_head: bool = False) -> Iterator[str]:
    if folder is None:
        return
    try:
        family = load_family(folder, value_head=value_head)
        read_generation_config(folder)
        if any(folder.glob("*.safetensors")):  # else reported with the settings, or random
            find_tensors(folder, family)
    except FileNotFoundError:
        return  # reported with the settings
    except HuggingFaceCheckpointError as error:
        yield from (f"{setting}: {folder}: {problem}" for problem in error.problems)
    except ValueError as error:
        yield f"{setting}: {error}"


def _judge(known: Settings) -> Iterator[str]:
    """A judge that engines of the run hold has to understand a conversation, and to have room for its reply."""
    setting, folder = "reward.judge_hf_checkpoint", known.get("judge_hf_checkpoint")
    yield from _model(setting, folder)
    if folder is None or not (folder / "config.json").is_file() or not _is_supported(folder):
        return
    try:
        arguments = JudgeArguments.model_validate(known.get("judge_arguments") or {})
        tokenizer, probe = Tokenizer(folder), [{"role": "user", "content": "?"}]
        if tokenizer.chat_template.exists:
            tokenizer.render(probe, arguments=arguments.chat_template_kwargs)
        else:
            yield f"{setting}: {folder} has no chat template, by which the judge is asked: add chat_template.jinja"
    except ValidationError:
        return  # reported with the settings
    except TokenizerError as error:
        yield f"{setting}: {error}"
    context = (known.get("judge_sglang") or {}).get("context_length") or load_family(folder).max_sequence_length
    if arguments.max_tokens >= context:
        yield (
            f"reward.judge_arguments: max_tokens = {arguments.max_tokens} leaves no room for a question in the judge's "
            f"context of {context}; lower it"
        )


def _concerns_data(path: str) -> bool:
    """Whether rows could be read differently if the setting at ``path`` had no error."""
    return path.partition(".")[0] in ("data", "model", "eval", "reward") or path in (
        "run.mode",
        "rollout.rollout_max_response_len",
        "train.max_tokens_per_gpu",
        "megatron.context_parallel_size",
    )


def _is_supported(folder: Path) -> bool:
    try:
        load_family(folder)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _checkpoint(config: Config, known: Settings, task: str) -> Iterator[str]:
    named = config.checkpoint.load if "checkpoint.load" in known else None
    resumed = newest(config.run_dir) if config.checkpoint.resume and {"name", "output_dir"} <= set(known) else None
    folder = resumed or named
    if folder is None or not folder.is_dir():
        return
    try:
        step = read(folder).step
    except ResumeError as error:
        if resumed is None:  # else the one before it is taken
            yield f"checkpoint.load: {error}"
        return
    if task == "train" and "num_rollout" in known and step > config.run.num_rollout:
        yield (
            f"run.num_rollout: {config.run.num_rollout} steps are fewer than the {step} after which "
            f"{folder} was written; set it to more to go on, or export that model with `miles-spmd export`"
        )


def _plug_ins(known: Settings) -> Iterator[str]:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as in the ranks, which `python -m` starts
    rewards = {"reward.rm_type": (known.get("reward.rm_type"), known.get("reward.reward_batched"))}
    for table in ("reward.further", "eval.sets"):
        terms = enumerate(known.get(table) or [])
        rewards |= {f"{table}.{number}.rm_type": (term.rm_type, term.reward_batched) for number, term in terms}
    for setting, (name, batched) in rewards.items():
        if name is not None and ":" in name:
            try:
                load_reward(name, bool(batched))
            except PlugPointError as error:
                yield str(error).replace("reward.rm_type", setting, 1)
    environment = known.get("environment.environment")
    if isinstance(environment, str) and environment != SINGLE_TURN:
        try:
            load_environment(environment, known.get("environment.environment_kwargs") or {})
        except PlugPointError as error:
            yield str(error)
    for setting, protocol in PROTOCOLS.items():
        name = known.get(setting)
        if isinstance(name, str) and ":" in name:
            try:
                import_function(setting, name, (), protocol)
            except PlugPointError as error:
                yield str(error)


def _data(config: Config, tokenizer: Tokenizer, task: str) -> Iterator[str]:
    """Read the first rows of each file as the run will."""
    none = config.eval.model_copy(update={"eval_prompt_data": {}, "sets": []})
    if task != "eval":
        data = config.data.model_copy(update={"prompt_data": _head(config.data.prompt_data)})
        training = config.model_copy(update={"data": data, "eval": none})
        yield from _file("data.prompt_data", config.data.prompt_data, training, tokenizer, task)
    for name, source in config.eval.eval_prompt_data.items():
        alone = config.model_copy(update={"eval": none.model_copy(update={"eval_prompt_data": {name: _head(source)}})})
        yield from _file(f"eval.eval_prompt_data.{name}", source, alone, tokenizer, "eval")
    for number, one in enumerate(config.eval.sets):
        head = one.model_copy(update={"prompt_data": _head(one.prompt_data)})
        alone = config.model_copy(update={"eval": none.model_copy(update={"sets": [head]})})
        yield from _file(f"eval.sets.{number}.prompt_data", one.prompt_data, alone, tokenizer, "eval")


def _file(setting: str, source: str, config: Config, tokenizer: Tokenizer, task: str) -> Iterator[str]:
    training = task != "eval"
    try:
        datasets = Datasets(config, tokenizer, training=training, scored=config.scores(task))
    except DataError as error:
        if any("no such file" in str(problem) for problem in error.errors):
            return  # reported with the settings
        for line in str(error).replace(_head(source), source).splitlines():
            if not ("no rows" in line and _has_more(source)):  # there may be shorter ones further on
                yield f"{setting}: {line}"
        return
    except TokenizerError as error:
        yield f"model.hf_checkpoint: {error}"
        return
    if training and config.run.mode == "rl":
        try:
            yield from _columns(setting, config.reward.terms, datasets.first())
        except PlugInError as error:  # of the curriculum
            yield str(error)
    for one in config.eval_sets if not training else ():
        yield from _columns(setting, one.terms or config.reward.terms, datasets.eval_sets.get(one.name, []))


def _columns(setting: str, terms: Sequence[RewardTerm], prompts: Sequence[Prompt]) -> Iterator[str]:
    for name in (term.rm_type for term in terms if prompts and ":" in term.rm_type):
        try:
            problem = missing_columns(import_function("reward.rm_type", name, ()), prompts[0])
        except PlugPointError:
            continue  # reported already
        if problem:
            yield f"{setting}: rm_type = {name!r} {problem}"


def _has_more(source: str) -> bool:
    """Whether a file has more rows than are examined."""
    return _head(source) != source and len(list(islice(read_rows(source, []), EXAMINED_ROWS + 1))) > EXAMINED_ROWS


def _head(source: str) -> str:
    """Return ``source`` with a slice of at most EXAMINED_ROWS rows."""
    try:
        path, rows = parse_slice(source)
    except DataError:
        return source
    start = rows.start or 0
    if start < 0 or (rows.stop is not None and rows.stop < 0):
        return source
    stop = start + EXAMINED_ROWS
    return f"{path}@[{start}:{stop if rows.stop is None else min(stop, rows.stop)}]"
