"""From prompts to scored samples, for training and for evaluation.

Groups are scored while others are still generating. Where a filter drops groups, more prompts are submitted as soon as
those that were submitted cannot fill the batch, while the slowest responses are still generating.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from miles_spmd.algorithms.rewards import GROUP_FILTERS
from miles_spmd.config import Config
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.acceptance import Acceptance, Group
from miles_spmd.controller.generation.evaluation import eval_metrics, eval_sampling
from miles_spmd.controller.journal.events import EvaluationFinished, RolloutFinished
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.types.request import Output, Request, SamplingParams
from miles_spmd.types.sample import FinishReason, Prompt, Sample
from miles_spmd.types.seeds import sample_seed

EVAL_SEED_STEP = 0  # evaluations differ in the weights only: the seeds of each are those of step 0


class Generation:
    """Generates with the weights in the engines. Methods raise RewardError, FilterError and WorkerError."""

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        tokenizer: Tokenizer,
        rewards: RewardPool,
        data: Datasets,
        journal: Journal,
    ) -> None:
        self._config, self._cluster, self._tokenizer = config, cluster, tokenizer
        self._rewards, self._data, self._journal = rewards, data, journal
        name = config.algorithm.dynamic_sampling_filter
        self._filter = None if name is None else GROUP_FILTERS.resolve(name)

    def rollout(self, step: int) -> list[Group]:
        """Return the scored samples that ``step`` trains on, groups in the order of submission."""
        r = self._config.rollout
        acceptance = Acceptance(self._rewards, r.rollout_batch_size, self._filter)
        with self._journal.timed("rollout"):
            waves = self._data.waves(step).__next__
            self._generate(acceptance, waves, self._sampling, r.n_samples_per_prompt, step, seed_step=step)
        self._journal.publish(RolloutFinished(step, acceptance.accepted, acceptance.dropped))
        return acceptance.accepted

    def evaluate(self, step: int) -> None:
        """Score the responses to the prompts of every held-out set, ``step`` steps into the run."""
        sampling, count = eval_sampling(self._config), self._config.eval.n_samples_per_eval_prompt
        sets: dict[str, list[Group]] = {}
        with self._journal.timed("eval"):
            for name, prompts in self._data.eval_sets.items():
                acceptance = Acceptance(self._rewards, len(prompts))
                wave, purpose = iter([prompts]).__next__, f"evaluation of {name}"
                self._generate(acceptance, wave, sampling, count, step, seed_step=EVAL_SEED_STEP, purpose=purpose)
                sets[name] = acceptance.accepted
        self._journal.publish(EvaluationFinished(step, eval_metrics(sets), sets))

    def request(self, sample: Sample, step: int) -> Request:
        """Return the request that generates ``sample`` in ``step``."""
        return self._request(0, sample, self._sampling, step)

    def _generate(
        self,
        acceptance: Acceptance,
        next_wave: Callable[[], Sequence[Prompt]],
        sampling: SamplingParams,
        samples_per_prompt: int,
        step: int,
        *,
        seed_step: int,
        purpose: str = "",
    ) -> None:
        """Submit prompts wave by wave until enough groups are accepted; what is still running then is aborted.

        A wave is submitted only when it is certain to be needed, so the submitted waves do not depend on timing.
        """
        with self._cluster.rollout(step, purpose=purpose) as session:
            while not acceptance.enough:
                while acceptance.short:
                    wave = [[Sample(prompt, index) for index in range(samples_per_prompt)] for prompt in next_wave()]
                    first = acceptance.add(wave)
                    groups = enumerate(wave, first)
                    session.submit([self._request(n, s, sampling, seed_step) for n, group in groups for s in group])
                if (output := session.next(interrupt=lambda: acceptance.has_news)) is not None:
                    number, index = map(int, output.rid.split("."))
                    self._fill(acceptance.group(number)[index], output)
                    acceptance.finish_sample(number)
                elif not acceptance.has_news:  # nothing is running: only rewards are missing
                    acceptance.wait()
                acceptance.resolve()

    def _request(self, number: int, sample: Sample, sampling: SamplingParams, seed_step: int) -> Request:
        seed = sample_seed(self._config.run.seed, seed_step, sample.prompt.uid, sample.index, turn=0)
        return Request(
            rid=f"{number}.{sample.index}",
            input_ids=sample.prompt.tokens,
            sampling=msgspec.structs.replace(sampling, seed=seed),
            return_top1=self._config.determinism.counts_flips,
        )

    def _fill(self, sample: Sample, output: Output) -> None:
        sample.response = output.output_ids
        sample.rollout_log_probs = output.output_log_probs
        sample.top1_ids = output.top1_ids
        sample.loss_mask = [1] * len(output.output_ids)
        sample.finish_reason = FinishReason(output.finish_reason)
        sample.weight_versions = output.weight_versions
        sample.text = self._tokenizer.decode(output.output_ids, skip_special_tokens=True)

    @property
    def _sampling(self) -> SamplingParams:
        r = self._config.rollout
        return SamplingParams(
            max_new_tokens=r.rollout_max_response_len,
            temperature=r.rollout_temperature,
            top_p=r.rollout_top_p,
            top_k=r.rollout_top_k,
            stop=r.rollout_stop,
            stop_token_ids=r.rollout_stop_token_ids,
        )
