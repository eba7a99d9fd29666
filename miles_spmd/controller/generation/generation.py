"""From prompts to scored samples, for training and for evaluation; or those that another run recorded.

Groups are scored while others are still generating. Where a filter drops groups, more prompts are submitted as soon as
those that were submitted cannot fill the batch, while the slowest responses are still generating.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from miles_spmd.algorithms.rewards import GROUP_FILTERS
from miles_spmd.config import Config, EvalSet
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.errors import Unfinished
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.acceptance import Acceptance, Group
from miles_spmd.controller.generation.episodes import Episodes, Host
from miles_spmd.controller.generation.sampling import Sampling
from miles_spmd.controller.generation.unfinished import (
    Response,
    UnfinishedRollout,
    changes,
    described,
    engine_settings,
)
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.controller.journal.metrics import eval_metrics
from miles_spmd.controller.journal.stopping import Stopping
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import LedgerError
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.types.request import Request
from miles_spmd.types.sample import Prompt, Sample


class FilterError(RuntimeError):
    """The filter dropped so many groups that a batch cannot be filled."""


class Generation:
    """Generates with the weights in the engines. Methods raise RewardError, FilterError, EnvironmentFailedError and
    WorkerError."""

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        rewards: RewardPool,
        data: Datasets,
        journal: Journal,
        stopping: Stopping,
        host: Host,
    ) -> None:
        self._config, self._cluster, self._stopping = config, cluster, stopping
        self._rewards, self._data, self._journal = rewards, data, journal
        name = config.algorithm.dynamic_sampling_filter
        self._filter = None if name is None else GROUP_FILTERS.resolve(name)
        self._host = host
        self._numbers = itertools.count()  # of all episodes
        self._given: Mapping[str, Response] = {}  # of the next rollout, from before an interruption
        self._episodes: Episodes | None = None  # of the rollout of the step under way

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
        made = {} if self._episodes is None else self._episodes.responses(step)
        responses = {**self._given, **made}
        if not responses:
            return b"", ""
        return UnfinishedRollout(step, engine_settings(self._config), responses).encode(), described(responses.values())

    def rollout(self, step: int) -> list[Group]:
        """Return the scored samples that ``step`` trains on, groups in the order of submission. Raises Unfinished where
        the run has to stop before they are complete."""
        count, wake = self._config.rollout.rollout_batch_size, self._cluster.wake
        acceptance = Acceptance(self._rewards, count, self._filter, wake=wake)
        if self._given:
            self._stopping.show(f"step {step} continues {described(self._given.values())}")
        with self._journal.timed("rollout", step):
            sampling = Sampling.of_step(self._config, step)
            self._episodes = self._call(sampling, count, self._given)
            self._generate(acceptance, self._episodes, self._data.waves(step), step)
        self._given = {}
        if not acceptance.enough:
            self._tell_too_few(step, acceptance)
        self._journal.publish(
            events.RolloutFinished(step, acceptance.accepted, acceptance.dropped, dict(self._episodes.failures))
        )
        return acceptance.accepted

    def forget(self) -> None:
        """The step is complete: its responses are no longer unfinished."""
        self._episodes = None

    def evaluate(self, step: int, due: Sequence[EvalSet]) -> None:
        """Score the responses to the prompts of the held-out sets ``due``, ``step`` steps into the run."""
        sets: dict[str, list[Group]] = {}
        with self._journal.timed("eval", step):
            for one in due:
                prompts = self._data.eval_sets[one.name]
                wake = self._cluster.wake
                acceptance = Acceptance(self._rewards, len(prompts), terms=one.terms, wake=wake, keeps_empty=True)
                episodes = self._call(Sampling.of_set(self._config, one), len(prompts))
                self._generate(acceptance, episodes, iter([prompts]), step)
                sets[one.name] = [group for group in acceptance.accepted if group]
        self._journal.publish(events.EvaluationFinished(step, eval_metrics(sets), sets))

    def _tell_too_few(self, step: int, acceptance: Acceptance) -> None:
        """Say why groups were dropped. Raises FilterError where that ends the run."""
        what = self._config.algorithm.too_few_groups
        kept, submitted = len(acceptance.accepted), len(acceptance.groups)
        text = (
            f"step {step}: {kept} of {submitted} groups were kept, of which {self._config.rollout.rollout_batch_size} "
            f"are needed; dropped: {acceptance.describe_dropped()}; the task is too easy or too hard for this policy, "
            "or the reward does not distinguish its responses"
        )
        if what == "stop":
            raise FilterError(f"{text}: change the data, the reward or algorithm.dynamic_sampling_filter")
        if what == "skip":
            acceptance.accepted.clear()
        self._stopping.show(f"warning: {text}; " + ("trained on those" if acceptance.accepted else "no update"))

    def _call(self, sampling: Sampling, count: int, given: Mapping[str, Response] | None = None) -> Episodes:
        """Return the episodes of a rollout that needs ``count`` groups."""
        return Episodes(self._host, sampling, self._numbers, self._config.environment, count, given)

    def request(self, sample: Sample, step: int, turn: int) -> Request:
        """Return the request that a turn of ``sample`` came from in ``step``."""
        return Sampling.of_step(self._config, step).request_of(sample, turn)

    def _generate(
        self, acceptance: Acceptance, episodes: Episodes, waves: Iterator[Sequence[Prompt]], step: int
    ) -> None:
        """Submit prompts wave by wave until enough groups are accepted; what is still running then is aborted.

        A wave is submitted only when it is certain to be needed, so the submitted waves do not depend on timing. There
        are too few groups where the waves end.
        Raises Unfinished where the run has to stop before.
        """

        def leaves() -> bool:  # an evaluation is repeated when the run is continued
            return self._stopping.must_leave(drains=True) or bool(episodes.purpose and self._stopping.source)

        def has_news() -> bool:
            return acceptance.has_news or episodes.has_news or leaves()

        with self._cluster.rollout(step, purpose=episodes.purpose) as session:
            while not acceptance.enough and not leaves():
                if acceptance.short and (wave := next(waves, None)) is not None:
                    episodes.begin(acceptance.add(len(wave), episodes.samples), wave)
                elif acceptance.settled:
                    return
                elif (output := session.next(interrupt=has_news)) is not None:
                    episodes.complete(output)
                if requests := episodes.requests():
                    session.submit(requests)
                for done in episodes.take_finished():
                    acceptance.finish(done.group, done.index, done.samples)
                acceptance.resolve()
            episodes.cancel()
            if not acceptance.enough:
                session.abort()
                while (output := session.next()) is not None:
                    episodes.complete(output)
        if not acceptance.enough:
            raise Unfinished


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
