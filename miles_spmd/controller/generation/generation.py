"""From prompts to scored samples, for training and for evaluation; or those that another run recorded.

Groups are scored while others are still generating. Where a filter drops groups, more prompts are submitted as soon as
those that were submitted cannot fill the batch, while the slowest responses are still generating.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import msgspec

from miles_spmd.algorithms.rewards import GROUP_FILTERS
from miles_spmd.config import Config, EvalSet
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.errors import Unfinished
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.acceptance import Acceptance, Group
from miles_spmd.controller.generation.unfinished import (
    Response,
    UnfinishedRollout,
    changes,
    described,
    engine_settings,
    key,
    of_sample,
)
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.controller.journal.metrics import eval_metrics
from miles_spmd.controller.journal.stopping import Stopping
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
        stopping: Stopping,
    ) -> None:
        self._config, self._cluster, self._tokenizer, self._stopping = config, cluster, tokenizer, stopping
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
        self._given: dict[str, Response] = {}  # of the next rollout, from before an interruption
        self._groups: list[Group] = []  # of the rollout of the step under way

    def resume(self, step: int, data: bytes) -> None:
        """Continue the responses of the rollout of ``step`` that :meth:`unfinished` returned."""
        if not data:
            return
        try:
            rollout = UnfinishedRollout.decode(data)
            differences = changes(rollout.engine, engine_settings(self._config))
        except ValueError as error:
            rollout, differences = None, [str(error)]
        if rollout is not None and rollout.step == step and not differences:
            self._given = rollout.responses
            return
        kept = described(rollout.responses.values()) if rollout else "what was saved"
        self._stopping.show(f"step {step} begins anew, without {kept}: {'; '.join(differences)}")

    def unfinished(self, step: int) -> tuple[bytes, str]:
        """Return the responses of the rollout of ``step`` that there are, b"" if none, and their numbers in words."""
        made = {
            key(self.request(sample, step)): of_sample(sample)
            for sample in chain.from_iterable(self._groups)
            if sample.response and [version for version, _ in sample.weight_versions] == [step]
        }
        responses = self._given | made
        if not responses:
            return b"", ""
        return UnfinishedRollout(step, engine_settings(self._config), responses).encode(), described(responses.values())

    def rollout(self, step: int) -> list[Group]:
        """Return the scored samples that ``step`` trains on, groups in the order of submission. Raises Unfinished where
        the run has to stop before they are complete."""
        acceptance = Acceptance(self._rewards, self._config.rollout.rollout_batch_size, self._filter)
        self._groups = acceptance.groups
        if self._given:
            self._stopping.show(f"step {step} continues {described(self._given.values())}")
        with self._journal.timed("rollout", step):
            self._generate(acceptance, self._data.waves(step), step)
        self._given = {}
        self._journal.publish(events.RolloutFinished(step, acceptance.accepted, acceptance.dropped))
        return acceptance.accepted

    def forget(self) -> None:
        """The step is complete: its responses are no longer unfinished."""
        self._groups = []

    def evaluate(self, step: int, due: Sequence[EvalSet]) -> None:
        """Score the responses to the prompts of the held-out sets ``due``, ``step`` steps into the run."""
        sets: dict[str, list[Group]] = {}
        with self._journal.timed("eval", step):
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
        ``eval_set``: the held-out set that the prompts are of, if any. Raises Unfinished after the samples have got
        what there is, where the run has to stop before.
        """
        purpose, count = "", self._config.rollout.n_samples_per_prompt
        if eval_set is not None:
            purpose, count = f"evaluation of {eval_set.name}", eval_set.n_samples_per_eval_prompt or 1

        def leaves() -> bool:  # an evaluation is repeated when the run is continued
            return self._stopping.must_leave(drains=True) or (eval_set is not None and bool(self._stopping.source))

        with self._cluster.rollout(step, purpose=purpose) as session:

            def leaves_meanwhile() -> bool:  # a request to stop may come by a rank
                session.listen()
                return leaves()

            while not acceptance.enough and not leaves():
                while acceptance.short:
                    wave = [[Sample(prompt, index) for index in range(count)] for prompt in next(waves)]
                    groups = enumerate(wave, acceptance.add(wave))
                    requests = [self.request(s, step, group=n, eval_set=eval_set) for n, g in groups for s in g]
                    session.submit(list(self._without_given(requests, acceptance)))
                if (output := session.next(interrupt=lambda: acceptance.has_news or leaves())) is not None:
                    acceptance.finish_sample(self._fill(acceptance, output))
                # without an output, a reward is there or all that is missing
                acceptance.resolve(wait=output is None, unless=leaves_meanwhile)
            if not acceptance.enough:
                session.abort()
                while (output := session.next()) is not None:
                    self._fill(acceptance, output)
        if not acceptance.enough:
            raise Unfinished

    def _without_given(self, requests: Sequence[Request], acceptance: Acceptance) -> Iterator[Request]:
        """Yield the requests that the engine has to do: all but those with a complete response from before an
        interruption, and those with a part of one from there on."""
        for request in requests:
            given = self._given.get(key(request)) if self._given else None
            if given is None:
                yield request
            elif not given.complete:
                yield msgspec.structs.replace(request, begun=given.begun)
            else:
                number = self._fill(acceptance, msgspec.structs.replace(given.output, rid=request.rid))
                sample = acceptance.groups[number][int(request.rid.split(".")[1])]
                sample.reward, sample.reward_detail = given.reward, given.reward_detail
                acceptance.finish_sample(number)

    def _fill(self, acceptance: Acceptance, output: Output) -> int:
        """Put an output into the sample that its request was for. Returns the number of its group."""
        number, index = map(int, output.rid.split("."))
        sample = acceptance.groups[number][index]
        sample.response = output.output_ids
        sample.rollout_log_probs = output.output_log_probs
        sample.top1_ids = output.top1_ids
        sample.loss_mask = [1] * len(output.output_ids)
        sample.finish_reason = FinishReason(output.finish_reason)
        sample.weight_versions = output.weight_versions
        sample.text = self._tokenizer.decode(output.output_ids, skip_special_tokens=True)
        return number


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
