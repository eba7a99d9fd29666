"""The data of a run, and which of it a step gets: a function of the seed and the step, with no state to checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from miles_spmd.config import Config
from miles_spmd.data.examples import PreferencePair, SftExample, load_preference_pairs, load_sft_examples
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.source import PromptSource
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.models import load_family
from miles_spmd.types.sample import Prompt
from miles_spmd.types.seeds import derive_seed

MAX_SPARE_WAVES = 8  # batches of prompts generated in place of groups that a filter drops, before the run ends


class FilterError(RuntimeError):
    """The filter dropped so many groups that a batch cannot be filled."""


class Datasets:
    """The evaluation sets by name, and where ``training`` the training data of the run's mode.

    Raises DataError, which names files and lines.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, *, training: bool) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._context = load_family(config.model.hf_checkpoint).max_sequence_length
        sources = config.eval.eval_prompt_data
        self.eval_sets: dict[str, list[Prompt]] = {}
        self.eval_pairs: dict[str, list[PreferencePair]] = {}
        if config.trains_on_pairs:
            self.eval_pairs = {name: self._load_pairs(name, source) for name, source in sources.items()}
        else:
            room = self._context - eval_response_len(config)
            self.eval_sets = {
                name: load_prompts(config.data, tokenizer, prompt_data=source, name=name, room=room)
                for name, source in sources.items()
            }
        if not training:
            return
        seed, shuffle = config.run.seed, config.data.rollout_shuffle
        match config.run.mode:
            case "rl":
                room = self._context - config.rollout.rollout_max_response_len
                prompts = load_prompts(config.data, tokenizer, room=room)
                self._prompts = PromptSource(prompts, seed, shuffle)
                self._spare = PromptSource(prompts, derive_seed("spare", seed))
            case "sft":
                longest = min(self._context, config.micro_batch_tokens)
                self._examples = PromptSource(load_sft_examples(config.data, tokenizer, max_len=longest), seed, shuffle)
            case "dpo" | "rm":
                self._pairs = PromptSource(self._load_pairs(), seed, shuffle)

    def _load_pairs(self, name: str | None = None, source: str | None = None) -> list[PreferencePair]:
        longest = min(self._context, self._config.micro_batch_tokens // 2)  # a pair has to be in one micro-batch
        scores_end = self._config.run.mode == "rm"
        return load_preference_pairs(
            self._config.data, self._tokenizer, prompt_data=source, name=name, max_len=longest, scores_end=scores_end
        )

    def waves(self, step: int) -> Iterator[list[Prompt]]:
        """Yield the prompts of ``step``, then waves of more prompts for groups that the filter drops. Raises
        FilterError at the end.

        Spare prompts are a sequence of their own, read at positions that belong to this step, so that they do not
        depend on how many other steps needed.
        """
        size = self._config.rollout.rollout_batch_size
        yield self._prompts.of_step(step, size)
        for wave in range(MAX_SPARE_WAVES):
            spare = self._spare.of_step(step * MAX_SPARE_WAVES + wave, size)
            # seeds are derived from uids: a prompt that was submitted before gets other responses
            yield [msgspec.structs.replace(prompt, uid=f"{prompt.uid}+{wave + 1}") for prompt in spare]
        raise FilterError(
            f"step {step}: algorithm.dynamic_sampling_filter kept fewer than {size} of "
            f"{(1 + MAX_SPARE_WAVES) * size} groups; the task is too easy or too hard for this policy, or the reward "
            "does not distinguish its responses: change the data, the reward or the filter"
        )

    def examples(self, step: int) -> list[SftExample]:
        """Return the supervised examples of ``step``."""
        return self._examples.of_step(step, self._batch_size)

    def pairs(self, step: int) -> list[PreferencePair]:
        """Return the preference pairs of ``step``."""
        return self._pairs.of_step(step, self._batch_size)

    @property
    def _batch_size(self) -> int:
        return self._config.train.global_batch_size or self._config.rollout.rollout_batch_size


def eval_response_len(config: Config) -> int:
    """Return the largest number of tokens that an evaluation generates for a prompt."""
    return config.eval.eval_max_response_len or config.rollout.rollout_max_response_len
