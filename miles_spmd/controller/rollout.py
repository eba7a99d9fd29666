"""One rollout: prompts out as requests, finished samples in, each group scored while the rest is still generating."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import msgspec

from miles_spmd.controller.workers import Workers
from miles_spmd.data.sample import FinishReason, Prompt, Sample
from miles_spmd.data.seeds import sample_seed
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.rewards.protocols import Score
from miles_spmd.rollout.engine import Output, Request, SamplingParams


def generate(
    workers: Workers,
    tokenizer: Tokenizer,
    rewards: RewardPool,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    samples_per_prompt: int,
    run_seed: int,
    step: int,
) -> list[list[Sample]]:
    """Answer every prompt ``samples_per_prompt`` times; groups come back scored and in the order of ``prompts``.

    Raises RewardError when a reward fails, and whatever :class:`Workers` raises.
    """
    groups = [[Sample(prompt, index) for index in range(samples_per_prompt)] for prompt in prompts]
    flat = [sample for group in groups for sample in group]
    unfinished = [samples_per_prompt] * len(groups)
    scores: dict[int, Future[list[Score]]] = {}
    with workers.rollout(step) as session:
        session.submit([_request(i, sample, sampling, run_seed, step) for i, sample in enumerate(flat)])
        for output in session.completions():
            position = int(output.rid)
            _fill(flat[position], output, tokenizer)
            group = position // samples_per_prompt
            unfinished[group] -= 1
            if not unfinished[group]:
                scores[group] = rewards.submit(groups[group])
    for group, future in sorted(scores.items()):
        for sample, result in zip(groups[group], future.result(), strict=True):
            sample.reward, sample.reward_detail = result.value, result.detail
    return groups


def _request(position: int, sample: Sample, sampling: SamplingParams, run_seed: int, step: int) -> Request:
    seed = sample_seed(run_seed, step, sample.prompt.uid, sample.index, turn=0)
    return Request(str(position), sample.prompt.tokens, msgspec.structs.replace(sampling, seed=seed))


def _fill(sample: Sample, output: Output, tokenizer: Tokenizer) -> None:
    sample.response = output.output_ids
    sample.rollout_log_probs = output.output_log_probs
    sample.loss_mask = [1] * len(output.output_ids)
    sample.finish_reason = FinishReason(output.finish_reason)
    sample.weight_versions = output.weight_versions
    sample.text = tokenizer.decode(output.output_ids, skip_special_tokens=True)
