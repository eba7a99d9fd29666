"""What a run reads, and which of it a step gets: a function of the seed and the step, with no state to checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from miles_spmd.config.schema import Config
from miles_spmd.controller.evaluation import load_eval_sets
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.sample import Prompt
from miles_spmd.data.seeds import derive_seed
from miles_spmd.data.sft import SftExample, load_sft_examples
from miles_spmd.data.source import PromptSource
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.models import load_family

MAX_SPARE_WAVES = 8  # batches of prompts tried in place of groups that a filter drops, before a step is given up


class FilterError(RuntimeError):
    """The filter dropped so many groups that a batch cannot be filled."""


class Datasets:
    """The evaluation sets, and the training data of the run's mode where ``training``. Raises DataError."""

    def __init__(self, config: Config, tokenizer: Tokenizer, *, training: bool) -> None:
        self._config = config
        context = load_family(config.model.hf_checkpoint).max_sequence_length
        self.eval_sets = load_eval_sets(config, tokenizer, context)
        seed, shuffle = config.run.seed, config.data.rollout_shuffle
        if not training:
            return
        if config.run.mode == "rl":
            prompts = load_prompts(config.data, tokenizer, room=context - config.rollout.rollout_max_response_len)
            self._prompts = PromptSource(prompts, seed, shuffle)
            self._spare = PromptSource(prompts, derive_seed("spare", seed))
        else:
            longest = min(context, max_tokens(config))
            self._examples = PromptSource(load_sft_examples(config.data, tokenizer, max_len=longest), seed, shuffle)

    def waves(self, step: int) -> Iterator[list[Prompt]]:
        """The prompts of ``step``, then more where the filter dropped groups: a second sequence of prompts, read at a
        place that belongs to this step, so that what other steps needed does not move it. Raises FilterError at its
        end."""
        size = self._config.rollout.rollout_batch_size
        yield self._prompts.draw(step, size)
        for wave in range(MAX_SPARE_WAVES):
            spare = self._spare.draw(step * MAX_SPARE_WAVES + wave, size)
            # seeds are made of uids: a prompt that was asked before gets other answers
            yield [msgspec.structs.replace(prompt, uid=f"{prompt.uid}+{wave + 1}") for prompt in spare]
        raise FilterError(
            f"step {step}: algorithm.dynamic_sampling_filter kept fewer than {size} of "
            f"{(1 + MAX_SPARE_WAVES) * size} groups; the task is too easy or too hard for this policy, or the reward "
            "does not tell its answers apart"
        )

    def examples(self, step: int) -> list[SftExample]:
        """The supervised examples of ``step``."""
        return self._examples.draw(
            step, self._config.train.global_batch_size or self._config.rollout.rollout_batch_size
        )


def max_tokens(config: Config) -> int:
    """Tokens that one micro-batch may hold over the ranks that share its sequences."""
    return config.train.max_tokens_per_gpu * int(config.megatron.get("context_parallel_size", 1))
