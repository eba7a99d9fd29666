"""The models of a run: what is computed with them, their updates, and which of their weights the engine has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from miles_spmd.config import Config
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.controller.journal.metrics import train_metrics
from miles_spmd.controller.journal.parity import Parity, describe_bisection, first_difference
from miles_spmd.controller.learning.batch import Scores, optimizer_steps, pair_sequences, set_loss_weights, to_sequences
from miles_spmd.controller.learning.models import Models
from miles_spmd.data.examples import PreferencePair
from miles_spmd.protocol.commands import Bisect, RefitEngine, SnapshotWeights
from miles_spmd.protocol.last_words import warn
from miles_spmd.types.engine_group import POLICY, in_group
from miles_spmd.types.request import Request
from miles_spmd.types.role import Role
from miles_spmd.types.rollout_batch import Arrays, Baselines
from miles_spmd.types.sample import Sample
from miles_spmd.types.train_sequence import TrainSequence


class TrainingDivergedError(RuntimeError):
    """Too many consecutive optimizer steps were skipped for a non-finite loss or gradient."""


class Policy:
    """The actor and the models that its algorithm needs, on the ranks of the group ``name``. The trainer's weights
    before step i are version i.

    ``baselines`` are those of the advantage estimator before the first step. Every method raises WorkerError where a
    rank fails.
    """

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        journal: Journal,
        parity: Parity,
        baselines: Baselines | None = None,
        name: str = POLICY,
    ) -> None:
        """``config`` is that of the whole run."""
        self.name, self._plays = name, config.plays
        self._config, self._cluster, self._journal, self._parity = config.of_policy(name), cluster, journal, parity
        self._models = Models(self._config, cluster, name)
        # of its roles, before a step that is done, and after it
        self._baselines: dict[int, Baselines] = {0: self._own_of(baselines or {})}
        self._engine_version: int | None = None  # of the weights in the engine; None: not yet the trainer's
        self._skipped_in_a_row = 0
        self._told_idle = False

    # --- before the update -------------------------------------------------------------------------------------------

    def own(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples of the roles that this policy plays. The first time that there are none is a warning."""
        own = [sample for sample in samples if self._plays(sample.role) == self.name]
        if samples and not own and not self._told_idle:
            self._told_idle = True
            roles = ", ".join(sorted({repr(sample.role) for sample in samples}))
            warn(
                f"the policy {self.name!r} plays no role of these samples ({roles}), and is not updated; "
                "see second_policy.second_roles"
            )
        return own

    def score(self, step: int, samples: Sequence[Sample], sequences: Sequence[TrainSequence]) -> Scores:
        """Return the scores that the algorithm needs from before the update. Compares engine and trainer where that is
        possible, which may mask tokens of ``sequences``. Raises ParityError."""
        if not samples:  # a filter has kept none
            return {}
        self._parity.begin_step(samples, sequences, self._engine_version)
        with self._journal.timed("log_probs", step):
            scores = self._models.scores(step, sequences)
        algorithm = self._config.algorithm
        # Engine and trainer can only be compared on the same weights: those in the engine are the newest ones, or the
        # trainer has a copy of them. Otherwise the difference would measure how stale the samples are.
        if not (algorithm.keep_old_actor or self._engine_version == step):
            return scores
        if self._parity.counts_flips:
            role = Role.OLD_ACTOR if algorithm.keep_old_actor else Role.ACTOR
            with self._journal.timed("log_probs", step):
                top1, _ = self._models.top_k_tokens(step, sequences, role, 1)
            self._measured(step, self._parity.check_top1(step, sequences, top1))
        if "old_log_probs" in scores and not algorithm.use_rollout_logprobs:
            self._check_parity(step, sequences, scores["old_log_probs"])
        return scores

    def optimizer_steps(
        self, step: int, samples: Sequence[Sample], sequences: Sequence[TrainSequence], scores: Scores
    ) -> list[list[TrainSequence]]:
        """Return the batch of each optimizer step of a rollout, with advantages and global loss weights."""
        if not samples:
            return []
        before = self.baselines(step)
        batches, metrics, after = optimizer_steps(samples, sequences, scores, self._config, before)
        self._baselines = {step: before, step + 1: after}
        self._measured(step, metrics)
        return batches

    def baselines(self, step: int) -> Baselines:
        """Return the advantage estimator's baselines before ``step``: the newest step, which may be under way, or the
        one after it."""
        return self._baselines[max(known for known in self._baselines if known <= step)]

    def pair_batch(self, step: int, pairs: Sequence[PreferencePair]) -> list[TrainSequence]:
        """Return the sequences of preference pairs, weighted to the mean over pairs, with the log-probs of the
        reference policy where the loss needs them."""
        batch = pair_sequences(pairs)
        if self._config.has_reference:
            with self._journal.timed("log_probs", step):
                reference = self._models.log_probs(step, batch, Role.REF)
            for sequence, log_probs in zip(batch, reference, strict=True):
                sequence.ref_log_probs = log_probs
        set_loss_weights(batch, "rollout_mean", max_response_len=0, rollout_ids=np.arange(len(batch)) // 2)
        return batch

    def _own_of(self, baselines: Baselines) -> Baselines:
        own = {
            game: {role: b for role, b in roles.items() if self._plays(role) == self.name}
            for game, roles in baselines.items()
        }
        return {game: roles for game, roles in own.items() if roles}

    # --- the update --------------------------------------------------------------------------------------------------

    def train(self, step: int, batch: Sequence[TrainSequence]) -> None:
        """Make one optimizer step on ``batch``: of the critic, where there is one, and after its warm-up of the actor.
        Raises ParityError, and TrainingDivergedError after too many skipped steps in a row."""
        self._journal.publish(events.BatchStarted(step, sum(len(s.tokens) for s in batch)))
        if self._config.has_critic:
            self._update(step, batch, Role.CRITIC)
            if step < self._config.train.num_critic_only_steps:
                return
        log_probs = self._update(step, batch, Role.ACTOR)
        # Where nothing was scored before, the first update's own forward pass still has the weights that generated.
        generated = batch[0].rollout_log_probs is not None and self._engine_version == step
        if generated and self._parity.checked != step:
            self._check_parity(step, batch, log_probs)

    def _update(self, step: int, batch: Sequence[TrainSequence], role: Role) -> Arrays:
        trainers = self._cluster.trainers(self.name)
        with self._journal.timed("train", step):
            results, log_probs = self._models.train(step, batch, role)
        metrics = train_metrics(results, trainers, critic=role is Role.CRITIC)
        self._journal.publish(
            events.UpdateFinished(step, role, batch, results, log_probs, self._named(metrics), self.name)
        )
        skipped = next(r.skipped for r, rank in zip(results, trainers, strict=True) if rank.reports)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row > self._config.train.max_skipped_steps:
            raise TrainingDivergedError(
                f"step {step}: {self._skipped_in_a_row} optimizer steps in a row were skipped, last for a {skipped}; "
                "lower megatron.lr or megatron.clip_grad, and look in metrics.jsonl for the step where it began"
            )
        return log_probs

    def _check_parity(self, step: int, sequences: Sequence[TrainSequence], log_probs: Arrays) -> None:
        self._measured(step, self._parity.check(step, sequences, log_probs))

    def _measured(self, step: int, metrics: Mapping[str, float]) -> None:
        self._journal.publish(events.Measured(step, self._named(metrics)))

    def _named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {in_group(self.name, name): value for name, value in metrics.items()}

    # --- weights -----------------------------------------------------------------------------------------------------

    def update_reference(self, version: int) -> None:
        """Make weights ``version`` the reference policy's where ``ref_update_interval`` is due."""
        interval = self._config.algorithm.ref_update_interval
        if self._config.has_reference and interval and version % interval == 0:
            self._cluster.call(SnapshotWeights(Role.REF), step=version, group=self.name)

    def admit(self, version: int) -> None:
        """Let cells that were lost and are built again take part, with weights ``version``."""
        for cell in self._cluster.cells.admit(version):
            if version == self._engine_version:
                self._cluster.call(RefitEngine(version), step=version, cell=cell)

    def refit(self, version: int) -> None:
        """Copy weights ``version`` into the engine where the next rollout is due to use them."""
        interval = self._config.refit.update_weights_interval
        if self._config.run.mode == "rl" and (self._engine_version is None or version % interval == 0):
            self.refit_now(version)

    def refit_now(self, version: int) -> None:
        """Copy weights ``version`` into the engine, unless it has them."""
        if version == self._engine_version:
            return
        with self._journal.timed("refit", version):
            results = self._cluster.call(RefitEngine(version), step=version, group=self.name)
        self._engine_version = version
        self._journal.publish(events.EngineRefitted(version, results))
        if self._config.algorithm.keep_old_actor:
            self._cluster.call(SnapshotWeights(Role.OLD_ACTOR), step=version, group=self.name)

    # --- held-out pairs, and the search for a difference -------------------------------------------------------------

    def evaluate(self, step: int, sets: Mapping[str, Sequence[PreferencePair]]) -> None:
        """Score the held-out pairs of every set with the newest weights."""
        metrics: dict[str, float] = {}
        with self._journal.timed("eval", step):
            for name, pairs in sets.items():
                with self._cluster.doing(f"evaluation of {name}"):
                    metrics |= self._models.preference_metrics(step, name, pairs)
        self._journal.publish(events.EvaluationFinished(step, metrics, {}))

    def bisect(self, step: int, samples: Sequence[Sample], request: Callable[[Sample, int, int], Request]) -> str:
        """Return in words which operator is the first whose output differs between engine and trainer, for the first
        token of ``samples`` whose log-probs differ. The engine generates that response again, by the ``request`` of the
        sample's turn."""
        sequences = to_sequences(samples)
        found = first_difference(samples, sequences, self._models.log_probs(step, sequences, Role.ACTOR))
        if found is None:
            return f"step {step}: log-probs of engine and trainer are bitwise equal for every token"
        sample, token = found
        # computing log-probs may have released the engine's memory, and with it its weights
        self._cluster.call(RefitEngine(step), step=step, group=self.name)
        turn, _ = sample.trajectory.turn_at(token)
        bisections = self._cluster.call(Bisect(request(sample, step, turn), token), step=step, group=self.name)
        return describe_bisection(step, sample, token, bisections)


def all_baselines(policies: Sequence[Policy], step: int) -> Baselines:
    """Return what the policies, which play different roles, return as their baselines before ``step``."""
    found: dict[str, dict[str, float]] = {}
    for policy in policies:
        for game, roles in policy.baselines(step).items():
            found.setdefault(game, {}).update(roles)
    return found
