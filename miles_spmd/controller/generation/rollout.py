"""One rollout: prompts out as requests, finished samples in, each group scored while the rest is still generating.

A group is accepted only once every group submitted before it is resolved, so which groups a step trains on does not
depend on which happened to finish first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec

from miles_spmd.controller.cluster.cluster import Cluster, RolloutSession
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.plugins.reward import Score
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.types.request import Output, Request, SamplingParams
from miles_spmd.types.sample import FinishReason, Prompt, Sample
from miles_spmd.types.seeds import sample_seed

Group = list[Sample]


@dataclass(frozen=True)
class Rollouts:
    """What generates and scores, and how: the same for every step."""

    workers: Cluster
    tokenizer: Tokenizer
    rewards: RewardPool
    run_seed: int
    return_top1: bool = False  # see Request

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, samples_per_prompt: int, step: int
    ) -> list[Group]:
        """Answer every prompt ``samples_per_prompt`` times; groups come back scored and in the order of ``prompts``.

        Raises RewardError when a reward fails, and whatever :class:`Workers` raises.
        """
        waves = iter([prompts])
        return self.generate_until(
            len(prompts), lambda: next(waves), sampling, samples_per_prompt=samples_per_prompt, step=step
        )[0]

    def generate_until(
        self,
        wanted: int,
        next_wave: Callable[[], Sequence[Prompt]],
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        step: int,
        keep: Callable[[Group], bool] | None = None,
    ) -> tuple[list[Group], int]:
        """The first ``wanted`` groups, in order of submission, that ``keep`` says yes to; and how many it dropped.

        Prompts are asked wave by wave until enough groups are accepted; what still runs then is stopped. Raises as
        :meth:`generate` does, and whatever ``next_wave`` raises when there is none.
        """
        acceptance = _Acceptance(self.rewards, wanted, keep)
        with self.workers.rollout(step) as session:
            while not acceptance.enough:
                wave = [[Sample(prompt, index) for index in range(samples_per_prompt)] for prompt in next_wave()]
                self._submit(session, acceptance.open(wave), wave, sampling, step)
                for output in session.completions():
                    if acceptance.enough:
                        continue  # of a group that is not needed any more
                    acceptance.take(output, self.tokenizer)
                    if acceptance.enough:
                        session.abort()
                acceptance.resolve(wait=True)
        return acceptance.accepted, acceptance.dropped

    def _submit(
        self, session: RolloutSession, first: int, wave: Sequence[Group], sampling: SamplingParams, step: int
    ) -> None:
        requests = []
        for number, group in enumerate(wave, first):
            for sample in group:
                requests.append(self.request(sample, sampling, step, number))
        session.submit(requests)

    def request(self, sample: Sample, sampling: SamplingParams, step: int, group: int = 0) -> Request:
        """What an engine is asked for ``sample``, the ``group``-th prompt's, in ``step``."""
        seed = sample_seed(self.run_seed, step, sample.prompt.uid, sample.index, turn=0)
        rid = f"{group}.{sample.index}"
        drawn = msgspec.structs.replace(sampling, seed=seed)
        return Request(rid, sample.prompt.tokens, drawn, return_top1=self.return_top1)


class _Acceptance:
    """Groups on their way: generating, being scored, accepted or dropped; the last two in the order of submission."""

    def __init__(self, rewards: RewardPool, wanted: int, keep: Callable[[Group], bool] | None) -> None:
        self.accepted: list[Group] = []
        self.dropped = 0
        self._rewards, self._wanted, self._keep = rewards, wanted, keep
        self._groups: list[Group] = []
        self._unfinished: list[int] = []
        self._scores: dict[int, Future[list[Score]]] = {}
        self._resolved = 0

    @property
    def enough(self) -> bool:
        return len(self.accepted) == self._wanted

    def open(self, wave: Sequence[Group]) -> int:
        """Take up a wave of groups; returns the number of its first one."""
        first = len(self._groups)
        self._groups += wave
        self._unfinished += [len(group) for group in wave]
        return first

    def take(self, output: Output, tokenizer: Tokenizer) -> None:
        number, index = map(int, output.rid.split("."))
        _fill(self._groups[number][index], output, tokenizer)
        self._unfinished[number] -= 1
        if not self._unfinished[number]:
            self._scores[number] = self._rewards.submit(self._groups[number])
        self.resolve(wait=False)

    def resolve(self, wait: bool) -> None:
        """Accept or drop scored groups in order, up to the first whose score is not there yet, or wait for it."""
        while not self.enough and (future := self._scores.get(self._resolved)) and (wait or future.done()):
            group = self._groups[self._resolved]
            for sample, score in zip(group, future.result(), strict=True):
                sample.reward, sample.reward_detail = score.value, score.detail
            self._resolved += 1
            if self._keep is None or self._keep(group):
                self.accepted.append(group)
            else:
                self.dropped += 1


def _fill(sample: Sample, output: Output, tokenizer: Tokenizer) -> None:
    sample.response = output.output_ids
    sample.rollout_log_probs = output.output_log_probs
    sample.top1_ids = output.top1_ids
    sample.loss_mask = [1] * len(output.output_ids)
    sample.finish_reason = FinishReason(output.finish_reason)
    sample.weight_versions = output.weight_versions
    sample.text = tokenizer.decode(output.output_ids, skip_special_tokens=True)
