"""From prompts to scored samples, for training and for evaluation; or those that another run recorded.

Groups are scored while others are still generating. Where a filter drops groups, more prompts are submitted as soon as
those that were submitted cannot fill the batch, while the slowest responses are still generating.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

from miles_spmd.algorithms.rewards import keeps_group
from miles_spmd.config import Config, EvalSet
from miles_spmd.config.environment import SINGLE_TURN
from miles_spmd.config.rollout import TIMED_ACCEPTANCE
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.errors import DeadlineError, Unfinished
from miles_spmd.controller.cluster.rollout_session import RolloutSession
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.acceptance import Acceptance, Group
from miles_spmd.controller.generation.admission import Admission, Pace
from miles_spmd.controller.generation.backlog import Supply
from miles_spmd.controller.generation.durable import DurableRollout, DurableTurns
from miles_spmd.controller.generation.episodes import Episodes, Host
from miles_spmd.controller.generation.judge import EngineJudge
from miles_spmd.controller.generation.sampling import Sampling
from miles_spmd.controller.generation.selection import selected
from miles_spmd.controller.generation.sessions import Sessions
from miles_spmd.controller.generation.unfinished import (
    Response,
    UnfinishedRollout,
    changes,
    described,
    engine_settings,
)
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.controller.journal.metrics import eval_metrics, users_eval_metrics
from miles_spmd.controller.journal.stopping import Stopping
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import LedgerError
from miles_spmd.plugins.reward import TrainerState
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.types.engine_group import SECOND_POLICY
from miles_spmd.types.request import Output, Request
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
        rewards: RewardPool | None,
        data: Datasets,
        journal: Journal,
        stopping: Stopping,
        host: Host,
        judge: EngineJudge | None = None,
    ) -> None:
        """``rewards``: None where nothing is scored. ``judge``: where engines of the run hold it, the one that
        ``rewards`` asks."""
        self._config, self._cluster, self._stopping, self._judge = config, cluster, stopping, judge
        self._rewards, self._data, self._journal = rewards, data, journal
        name = config.algorithm.dynamic_sampling_filter
        self._filter = None if name is None else partial(keeps_group, name)
        self._host, self._numbers = host, itertools.count()
        self._of_turns = config.environment.environment != SINGLE_TURN
        self._cache_share = (self._of_turns and config.environment.environment_cache_share) or math.inf
        self._pace = Pace()
        self._most_sessions = 0  # that ran at the same time in the last rollout
        self._supply = Supply(config, data)
        self._episodes = Episodes(host, self._numbers, config.environment)  # of training
        self.durable: DurableTurns | None = None  # where finished responses are kept on disk
        self._given: Mapping[str, Response] = {}  # of the next rollout, from before an interruption
        self._left: list[list[tuple[int, Group]]] = []  # rollouts of the groups that the last step left, which ended
        self._waiting: list[tuple[Prompt, int]] = []  # their prompts, and the steps in which they were begun

    def resume(self, step: int, data: bytes) -> None:
        """Continue the responses of the rollout of ``step`` that :meth:`unfinished` returned."""
        if not data:
            return
        try:
            rollout = UnfinishedRollout.decode(data)
            differences = changes(rollout.engine, engine_settings(self._config))
        except ValueError as error:
            rollout, differences = None, [str(error)]
        if rollout is not None and rollout.step == step and self._supply.keeps:
            self._supply.backlog = rollout.backlog
        if rollout is not None and rollout.step == step and not differences:
            self._given = rollout.responses
            return
        kept = described(rollout.responses.values()) if rollout else "what was saved"
        self._stopping.show(f"step {step} begins anew, without {kept}: {'; '.join(differences)}")

    def unfinished(self, step: int) -> tuple[bytes, str]:
        """Return what there is of the rollout of ``step``, b"" if nothing, and its numbers of responses in words."""
        responses = {**self._given, **self._episodes.responses(None if self._supply.keeps else step)}
        if not responses and not self._supply.keeps:
            return b"", ""
        kept = UnfinishedRollout(step, engine_settings(self._config), responses, self._supply.backlog)
        return kept.encode(), described(responses.values()) if responses else ""

    def backlog(self, step: int) -> bytes:
        """Return what a checkpoint before ``step`` has to keep of groups that wait."""
        return self.unfinished(step)[0] if self._supply.keeps else b""

    def rollout(self, step: int) -> list[Group]:
        """Return the scored samples that ``step`` trains on, groups in the order of submission. Raises Unfinished where
        the run has to stop before they are complete."""
        config, supply, episodes = self._config.rollout, self._supply, self._episodes
        first_finished = config.acceptance in TIMED_ACCEPTANCE and not supply.is_long
        acceptance = Acceptance(
            self._rewards,
            config.collected_groups,
            self._filter,
            wake=self._cluster.wake,
            first_finished=first_finished,
            state=self._state(step),
        )
        if self._given:
            self._stopping.show(f"step {step} continues {described(self._given.values())}")
        sampling = Sampling.of_step(self._config, step)
        with self._journal.timed("rollout", step):
            durable = None if self.durable is None else self.durable.rollout(step)
            if durable:
                self._stopping.show(f"step {step} has {len(durable)} complete responses on disk")
            episodes.open(self._given, durable=durable)
            begun = self._continue(acceptance)
            waves = chain([supply.first(step)], self._data.spare(step))
            kept = self._generate(acceptance, episodes, sampling, waves, step, supply.room)
            self._left = [acceptance.finished(number) for number in kept]
            left = kept if supply.continues else acceptance.left()
            self._waiting = [(acceptance.prompts[n], begun[n] if n < len(begun) else step) for n in left]
        self._given = {}
        if durable:
            self._tell_unused(step, durable, acceptance)
        if len(acceptance.accepted) < config.rollout_batch_size:
            self._tell_too_few(step, acceptance)
        groups = selected(self._config, step, acceptance.accepted)
        dropped = acceptance.dropped + len(acceptance.accepted) - len(groups)
        hits = episodes.cached / episodes.prefill if episodes.prefill else None
        sessions = self._most_sessions if self._of_turns else None
        failures = dict(episodes.failures)
        from_disk = None if durable is None else durable.used
        self._journal.publish(events.RolloutFinished(step, groups, dropped, failures, hits, sessions, from_disk))
        return groups

    def _continue(self, acceptance: Acceptance) -> list[int]:
        """Go on with the groups that the last step left behind. Returns the steps in which they were begun."""
        waiting = self._supply.continued()
        for number, (prompt, step) in enumerate(waiting):
            sampling = Sampling.of_step(self._config, step)
            acceptance.add([prompt], sampling.samples)
            if number < len(self._left):
                for index, samples in self._left[number]:
                    acceptance.finish(number, index, samples)
            else:  # from before an interruption
                self._episodes.begin(number, [prompt], sampling)
        return [step for _, step in waiting]

    def forget(self) -> None:
        """The step is complete: its responses are no longer unfinished."""
        self._episodes.forget()
        self._supply.end(self._waiting)

    def evaluate(self, step: int, due: Sequence[EvalSet]) -> None:
        """Score the responses to the prompts of the held-out sets ``due``, ``step`` steps into the run."""
        sets, failures = dict[str, list[Group]](), dict[str, float]()
        with self._journal.timed("eval", step):
            for one in due:
                prompts, wake = self._data.eval_sets[one.name], self._cluster.wake
                state = self._state(step)
                acceptance = Acceptance(
                    self._rewards, len(prompts), terms=one.terms, wake=wake, keeps_empty=True, state=state
                )
                sampling = Sampling.of_set(self._config, one)
                episodes = Episodes(self._host, self._numbers, self._config.environment, self._episodes)
                episodes.open(purpose=sampling.purpose)
                self._generate(acceptance, episodes, sampling, iter([prompts]), step)
                sets[one.name] = [group for group in acceptance.accepted if group]
                failures |= {f"eval/{one.name}-failed/{kind}": float(n) for kind, n in episodes.failures.items()}
                if not sets[one.name]:
                    self._stopping.show(f"warning: step {step}: no episode of {sampling.purpose} is left to be scored")
            metrics = eval_metrics(sets) | failures
            if (evaluator := self._config.eval.evaluator) is not None:
                metrics |= users_eval_metrics(evaluator, sets)
        self._journal.publish(events.EvaluationFinished(step, metrics, sets))

    def _state(self, step: int) -> TrainerState:
        return TrainerState(step, self._config.run.num_rollout)

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

    def _tell_unused(self, step: int, durable: DurableRollout, acceptance: Acceptance) -> None:
        """Warn of responses on disk that the episodes did not ask for which had them."""
        ended = {
            (prompt.uid, index)
            for number, prompt in enumerate(acceptance.prompts)
            for index, _ in acceptance.finished(number)
        }
        if unused := durable.unused(ended):
            self._stopping.show(
                f"warning: step {step}: {unused} of {len(durable)} responses on disk were not asked for again, because "
                "the environment did not act as before, or its settings are others; it was given new ones"
            )

    def request(self, sample: Sample, step: int, turn: int) -> Request:
        """Return the request that a turn of ``sample`` came from in ``step``."""
        return Sampling.of_step(self._config, step).request_of(sample, turn)

    def _generate(
        self,
        acceptance: Acceptance,
        episodes: Episodes,
        sampling: Sampling,
        waves: Iterator[Sequence[Prompt]],
        step: int,
        room: int = 0,
    ) -> list[int]:
        """Submit prompts wave by wave until enough groups are accepted; what is still running then is aborted. Of the
        groups that are left up to ``room`` can be continued in the next rollout; their numbers are returned.

        A wave is submitted only when it is certain to be needed, so the submitted waves do not depend on timing. There
        are too few groups where the waves end. Raises Unfinished where the run has to stop before.
        """

        def leaves() -> bool:  # an evaluation is repeated when the run is continued
            return self._stopping.must_leave(drains=True) or bool(sampling.purpose and self._stopping.source)

        judge = self._judge
        judging: AbstractContextManager[None] = nullcontext()
        if judge is not None:
            judging = judge.opened(step, sampling.purpose)

        def has_news() -> bool:
            judged = judge is not None and judge.has_news
            return acceptance.has_news or episodes.has_news or judged or leaves()

        with self._opened(step, sampling.purpose, episodes) as session, judging:
            longest = sampling.params.max_new_tokens
            admission = Admission(episodes, session, self._cache_share, longest, self._pace)
            while not acceptance.enough and not leaves():
                if judge is not None:
                    judge.take()
                if acceptance.short and (wave := next(waves, None)) is not None:
                    episodes.begin(acceptance.add(wave, sampling.samples), wave, sampling)
                elif acceptance.settled:
                    break
                elif (output := self._next(session, episodes, has_news)) is not None:
                    admission.received(output.rid)
                    episodes.complete(output)
                admission.add(episodes.requests())
                if requests := admission.take():
                    session.submit(requests)
                for done in episodes.take_finished():
                    acceptance.finish(done.group, done.index, done.samples)
                acceptance.resolve()
            complete = acceptance.enough or acceptance.settled
            kept = acceptance.left()[:room]
            if complete:
                episodes.close(kept)
            if kept or not complete:
                session.abort()
                while (output := session.next()) is not None:
                    episodes.complete(output)
            for output in admission.withdraw():
                episodes.complete(output)
        self._most_sessions = admission.most
        if not complete:
            raise Unfinished
        return kept

    @contextmanager
    def _opened(self, step: int, purpose: str, episodes: Episodes) -> Iterator[RolloutSession | Sessions]:
        """Open a rollout on the engines of all policies."""
        with self._cluster.rollout(step, purpose=purpose) as first:
            if SECOND_POLICY not in self._config.policies:
                yield first
                return
            named = ", ".join(filter(None, ["second policy", purpose]))
            with self._cluster.rollout(step, purpose=named, group=SECOND_POLICY) as second:
                yield Sessions(first, second, lambda rid: self._config.plays(episodes.role_of(rid)) == SECOND_POLICY)

    def _next(
        self, session: RolloutSession | Sessions, episodes: Episodes, interrupt: Callable[[], bool]
    ) -> Output | None:
        """Return the next output, None once ``interrupt`` returns True."""
        try:
            return session.next(interrupt)
        except DeadlineError as error:
            waits = [episodes.describe(), *([] if self._judge is None else [self._judge.describe()])]
            raise DeadlineError("\n  ".join([str(error), *waits]), error.details, error.rank) from error


class RecordedSamples:
    """The samples of the run in ``run_dir``, which read the same data."""

    def __init__(self, run_dir: Path, data: Datasets, journal: Journal) -> None:
        self._run_dir, self._data, self._journal = run_dir, data, journal

    def rollout(self, step: int) -> list[Group]:
        """Return the scored samples that the run trained on in ``step``. Raises LedgerError where it kept none."""
        recorded = step_data.read(self._run_dir, step)
        if recorded is None or recorded.samples is None:
            path = step_data.path_of(self._run_dir, step)
            raise LedgerError(f"{path}: the responses of step {step} were not kept; replay without --phase train")
        # The file has uids and tokens only; labels and metadata of the prompts are in the data.
        prompts = self._data.find(step, recorded.samples.uids)
        samples = recorded.samples.samples(prompts)
        groups = [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.prompt.uid)]
        self._journal.publish(events.RolloutFinished(step, groups, recorded.samples.dropped))
        return groups
