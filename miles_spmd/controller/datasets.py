"""What a run reads, and which of it a step gets: a function of the seed and the step, with no state to checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from miles_spmd.config import Config
from miles_spmd.controller.generation.evaluation import load_eval_pairs, load_eval_sets
from miles_spmd.data.preferences import PreferencePair, load_preference_pairs
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.sft import SftExample, load_sft_examples
from miles_spmd.data.source import PromptSource
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.models import load_family
from miles_spmd.types.sample import Prompt
from miles_spmd.types.seeds import derive_seed

MAX_SPARE_WAVES = 8  # batches of prompts tried in place of groups that a filter drops, before a step is given up


class FilterError(RuntimeError):
    """The filter dropped so many groups that a batch cannot be filled."""


class Datasets:
    """The evaluation sets, and the training data of the run's mode where ``training``. Raises DataError."""

    def __init__(self, config: Config, tokenizer: Tokenizer, *, training: bool) -> None:
        self._config = config
        context = load_family(config.model.hf_checkpoint).max_sequence_length
        longest = min(context, config.micro_batch_tokens)
        seed, shuffle = config.run.seed, config.data.rollout_shuffle
        self.eval_sets: dict[str, list[Prompt]] = {}
        self.eval_pairs: dict[str, list[PreferencePair]] = {}
        if config.trains_on_pairs:
            longest = min(context, config.micro_batch_tokens // 2)  # a pair is never parted
            self.eval_pairs = load_eval_pairs(config, tokenizer, longest)
        else:
            self.eval_sets = load_eval_sets(config, tokenizer, context)
        if not training:
            return
        match config.run.mode:
            case "rl":
                prompts = load_prompts(config.data, tokenizer, room=context - config.rollout.rollout_max_response_len)
                self._prompts = PromptSource(prompts, seed, shuffle)
                self._spare = PromptSource(prompts, derive_seed("spare", seed))
            case "sft":
                self._examples = PromptSource(load_sft_examples(config.data, tokenizer, max_len=longest), seed, shuffle)
            case mode:
                scores_end = mode == "rm"
                pairs = load_preference_pairs(config.data, tokenizer, max_len=longest, scores_end=scores_end)
                self._pairs = PromptSource(pairs, seed, shuffle)

    def waves(self, step: int) -> Iterator[list[Prompt]]:
        """The prompts of ``step``, then more where the filter dropped groups: a second sequence of prompts, read at a
        place that belongs to this step, so that what other steps needed does not move it. Raises FilterError at its
        end."""
        size = self._config.rollout.rollout_batch_size
        yield self._prompts.of_step(step, size)
        for wave in range(MAX_SPARE_WAVES):
            spare = self._spare.of_step(step * MAX_SPARE_WAVES + wave, size)
            # seeds are made of uids: a prompt that was asked before gets other answers
            yield [msgspec.structs.replace(prompt, uid=f"{prompt.uid}+{wave + 1}") for prompt in spare]
        raise FilterError(
            f"step {step}: algorithm.dynamic_sampling_filter kept fewer than {size} of "
            f"{(1 + MAX_SPARE_WAVES) * size} groups; the task is too easy or too hard for this policy, or the reward "
            "does not tell its answers apart"
        )

    def examples(self, step: int) -> list[SftExample]:
        """The supervised examples of ``step``."""
        return self._examples.of_step(step, self._batch_size)

    def pairs(self, step: int) -> list[PreferencePair]:
        """The preference pairs of ``step``."""
        return self._pairs.of_step(step, self._batch_size)

    @property
    def _batch_size(self) -> int:
        return self._config.train.global_batch_size or self._config.rollout.rollout_batch_size
