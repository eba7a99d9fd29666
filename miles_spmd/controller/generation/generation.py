"""From prompts to scored samples, for training and for evaluation; or those that another run recorded.

Groups are scored while others are still generating. Where a filter drops groups, more prompts are submitted as soon as
those that were submitted cannot fill the batch, while the slowest responses are still generating.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from miles_spmd.algorithms.rewards import GROUP_FILTERS
from miles_spmd.config import Config, EvalSet
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.acceptance import Acceptance, Group
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.controller.journal.metrics import eval_metrics
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import LedgerError
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
        name, r = config.algorithm.dynamic_sampling_filter, config.rollout
        self._filter = None if name is None else GROUP_FILTERS.resolve(name)
        self._sampling = SamplingParams(
            max_new_tokens=r.rollout_max_response_len,
            temperature=r.rollout_temperature,
            top_p=r.rollout_top_p,
            top_k=r.rollout_top_k,
            stop=r.rollout_stop,
            stop_token_ids=r.rollout_stop_token_ids,
        )

    def rollout(self, step: int) -> list[Group]:
        """Return the scored samples that ``step`` trains on, groups in the order of submission."""
        acceptance = Acceptance(self._rewards, self._config.rollout.rollout_batch_size, self._filter)
        with self._journal.timed("rollout"):
            self._generate(acceptance, self._data.waves(step), step)
        self._journal.publish(events.RolloutFinished(step, acceptance.accepted, acceptance.dropped))
        return acceptance.accepted

    def evaluate(self, step: int, due: Sequence[EvalSet]) -> None:
        """Score the responses to the prompts of the held-out sets ``due``, ``step`` steps into the run."""
        sets: dict[str, list[Group]] = {}
        with self._journal.timed("eval"):
            for one in due:
                prompts = self._data.eval_sets[one.name]
                acceptance = Acceptance(self._rewards, len(prompts), terms=one.terms)
                self._generate(acceptance, iter([prompts]), step, one)
                sets[one.name] = acceptance.accepted
        self._journal.publish(events.EvaluationFinished(step, eval_metrics(sets), sets))

    def request(self, sample: Sample, step: int, *, group: int = 0, eval_set: EvalSet | None = None) -> Request:
        """Return the request that generates ``sample`` in ``step`` as one of the samples of ``group``."""
        sampling, seed_step = self._sampling, step
        if eval_set is not None:
            seed_step = EVAL_SEED_STEP
            sampling = msgspec.structs.replace(
                sampling,
                max_new_tokens=eval_set.eval_max_response_len,
                temperature=eval_set.eval_temperature,
                top_p=eval_set.eval_top_p,
                top_k=-1,
            )
        seed = sample_seed(self._config.run.seed, seed_step, sample.prompt.uid, sample.index, turn=0)
        return Request(
            rid=f"{group}.{sample.index}",
            input_ids=sample.prompt.tokens,
            sampling=msgspec.structs.replace(sampling, seed=seed),
            return_top1=self._config.determinism.counts_flips,
        )

    def _generate(
        self, acceptance: Acceptance, waves: Iterator[Sequence[Prompt]], step: int, eval_set: EvalSet | None = None
    ) -> None:
        """Submit prompts wave by wave until enough groups are accepted; what is still running then is aborted.

        A wave is submitted only when it is certain to be needed, so the submitted waves do not depend on timing.
        ``eval_set``: the held-out set that the prompts are of, if any.
        """
        purpose, count = "", self._config.rollout.n_samples_per_prompt
        if eval_set is not None:
            purpose, count = f"evaluation of {eval_set.name}", eval_set.n_samples_per_eval_prompt or 1
        with self._cluster.rollout(step, purpose=purpose) as session:
            while not acceptance.enough:
                while acceptance.short:
                    wave = [[Sample(prompt, index) for index in range(count)] for prompt in next(waves)]
                    groups = enumerate(wave, acceptance.add(wave))
                    session.submit([self.request(s, step, group=n, eval_set=eval_set) for n, g in groups for s in g])
                if (output := session.next(interrupt=lambda: acceptance.has_news)) is not None:
                    number, index = map(int, output.rid.split("."))
                    self._fill(acceptance.groups[number][index], output)
                    acceptance.finish_sample(number)
                acceptance.resolve(wait=output is None)  # without an output, a reward is there or all that is missing

    def _fill(self, sample: Sample, output: Output) -> None:
        sample.response = output.output_ids
        sample.rollout_log_probs = output.output_log_probs
        sample.top1_ids = output.top1_ids
        sample.loss_mask = [1] * len(output.output_ids)
        sample.finish_reason = FinishReason(output.finish_reason)
        sample.weight_versions = output.weight_versions
        sample.text = self._tokenizer.decode(output.output_ids, skip_special_tokens=True)


class RecordedSamples:
    """The samples of the run in ``run_dir``, which read the same data."""

    def __init__(self, config: Config, run_dir: Path, data: Datasets, journal: Journal) -> None:
        self._group_size = config.rollout.n_samples_per_prompt
        self._run_dir, self._data, self._journal = run_dir, data, journal

    def rollout(self, step: int) -> list[Group]:
        """Return the scored samples that the run trained on in ``step``. Raises LedgerError where it kept none."""
        recorded = step_data.read(self._run_dir, step)
        if recorded is None or recorded.samples is None:
            path = step_data.path_of(self._run_dir, step)
            raise LedgerError(f"{path}: the responses of step {step} were not kept; replay without --phase train")
        # The file has uids and tokens only; labels and metadata of the prompts are in the waves that the step read.
        waves, prompts = self._data.waves(step), dict[str, Prompt]()
        while not set(recorded.samples.uids) <= prompts.keys():
            prompts |= {prompt.uid: prompt for prompt in next(waves)}
        samples, size = recorded.samples.samples(prompts), self._group_size
        groups = [samples[start : start + size] for start in range(0, len(samples), size)]
        self._journal.publish(events.RolloutFinished(step, groups, recorded.samples.dropped))
        return groups
