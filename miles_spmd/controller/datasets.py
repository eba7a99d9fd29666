"""The data of a run, and which of it a step gets: a function of the seed and the step, with no state to checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec

from miles_spmd.config import Config, RewardTerm
from miles_spmd.data.examples import PreferencePair, load_preference_pairs, load_sft_examples
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.source import PromptSource
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.models import load_family
from miles_spmd.rewards.labels import check_label
from miles_spmd.types.sample import Prompt
from miles_spmd.types.seeds import derive_seed

_log = logging.getLogger(__name__)
MAX_SPARE_WAVES = 8  # batches of prompts in place of groups that a filter drops


class Datasets:
    """The evaluation sets by name, and where ``training`` the training data of the run's mode; ``scored``: rewards have
    to be able to read its labels.

    Raises DataError, which names files and lines.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, *, training: bool, scored: bool = True) -> None:
        self._config = config
        if tokenizer.chat_template.reads_clock:
            _log.warning(
                "the chat template reads the clock: it reads %s, data.chat_template_date",
                config.data.chat_template_date,
            )
        data, mode = config.data, config.run.mode
        context = load_family(config.model.hf_checkpoint).max_sequence_length
        pair_len = min(context, config.micro_batch_tokens // 2)  # a pair has to be in one micro-batch
        load_pairs = partial(load_preference_pairs, tokenizer=tokenizer, max_len=pair_len, scores_end=mode == "rm")
        self.eval_sets: dict[str, list[Prompt]] = {}
        self.eval_pairs: dict[str, list[PreferencePair]] = {}
        if config.trains_on_pairs:
            for one in config.eval_sets:
                self.eval_pairs[one.name] = load_pairs(one.columns(data), prompt_data=one.prompt_data, name=one.name)
        else:
            self.eval_sets = {
                one.name: load_prompts(
                    one.columns(data),
                    tokenizer,
                    prompt_data=one.prompt_data,
                    name=one.name,
                    room=context - (one.eval_max_response_len or 0),
                    check_label=_checks_labels(one.terms or config.reward.terms, config.environment.environment),
                )
                for one in config.eval_sets
            }
        if not training:
            return
        items: list[Any]
        match mode:
            case "rl":
                room = context - config.rollout.rollout_max_response_len
                check = _checks_labels(config.reward.terms, config.environment.environment) if scored else None
                items = load_prompts(data, tokenizer, room=room, check_label=check)
            case "sft":
                items = load_sft_examples(data, tokenizer, max_len=min(context, config.micro_batch_tokens))
            case "dpo" | "rm":
                items = load_pairs(data)
        self._items: PromptSource[Any] = PromptSource(items, config.run.seed, data.rollout_shuffle, data.curriculum)
        self._spare: PromptSource[Any] = PromptSource(items, derive_seed("spare", config.run.seed))

    def batch(self, step: int) -> list[Any]:
        """Return the supervised examples or preference pairs of ``step``."""
        train, rollout = self._config.train, self._config.rollout
        return self._items.of_step(step, train.global_batch_size or rollout.rollout_batch_size)

    def first(self) -> list[Any]:
        """Return the first item alone, whatever the size of a batch."""
        return self._items.at(0, 1)

    def prompts(self, step: int, count: int) -> list[Prompt]:
        """Return the prompts of ``step``, of ``count`` a step."""
        return self._items.of_step(step, count)

    def find(self, step: int, uids: Collection[str]) -> dict[str, Prompt]:
        """Return the prompts with these uids, which ``step`` has had, and others."""
        spare = self.spare(step)
        found = {one.uid: one for one in self.prompts(step, self._config.rollout.submitted_groups)}
        found |= {uid: self.at(position) for uid in uids if (position := position_of(uid)) >= 0}
        while not set(uids) <= found.keys():
            found |= {one.uid: one for one in next(spare)}
        return found

    def at(self, position: int) -> Prompt:
        """Return the prompt at a place of the data, which its uid names: it may occur again in a later epoch."""
        (prompt,) = self._items.at(position, 1)
        return msgspec.structs.replace(prompt, uid=f"{prompt.uid}@{position}")

    def spare(self, step: int) -> Iterator[list[Prompt]]:
        """Yield a few waves of more prompts for groups that the filter drops.

        Spare prompts are a sequence of their own, read at positions that belong to this step, so that they do not
        depend on how many other steps needed.
        """
        size = self._config.rollout.rollout_batch_size
        for wave in range(MAX_SPARE_WAVES):
            spare = self._spare.of_step(step * MAX_SPARE_WAVES + wave, size)
            # seeds are derived from uids: a prompt that was submitted before gets other responses
            yield [msgspec.structs.replace(prompt, uid=f"{prompt.uid}+{wave + 1}") for prompt in spare]


def position_of(uid: str) -> int:
    """Return the place in the data that the uid of a prompt from :meth:`Datasets.at` names, -1 for another prompt's."""
    _, _, place = uid.rpartition("@")
    return int(place) if place.isdigit() else -1


def _checks_labels(terms: Sequence[RewardTerm], environment: str) -> Callable[[Any], str | None]:
    """Return a function that says why one of the reward functions cannot read a label. An environment of the user's may
    give rewards itself, for rows without a label."""

    def check(label: Any) -> str | None:
        if label is None and ":" in environment:
            return None
        problems = ((term.rm_type, check_label(term.rm_type, label)) for term in terms)
        return next((f"{problem} (reward {name!r})" for name, problem in problems if problem is not None), None)

    return check
