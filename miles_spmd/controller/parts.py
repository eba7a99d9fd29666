"""The parts of a run, built in order and closed in reverse, also where building one of them fails."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from miles_spmd.config import Config
from miles_spmd.config.environment import SINGLE_TURN
from miles_spmd.controller.attempts import AttemptWriter
from miles_spmd.controller.checkpoints import Checkpoints
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.durable import DurableTurns
from miles_spmd.controller.generation.episodes import Host
from miles_spmd.controller.generation.generation import Generation, RecordedSamples
from miles_spmd.controller.generation.judge import EngineJudge
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.faults import injected
from miles_spmd.controller.journal.hooks import Hook
from miles_spmd.controller.journal.journal import Journal, Observer, Writers
from miles_spmd.controller.journal.ledger import LedgerRecorder
from miles_spmd.controller.journal.metrics import Metrics
from miles_spmd.controller.journal.parity import Parity
from miles_spmd.controller.journal.stopping import Stopping
from miles_spmd.controller.learning.policy import Policy, all_baselines
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.context import ModelSource, ModelView
from miles_spmd.environments.in_place import InPlace
from miles_spmd.environments.pool import EnvironmentPool
from miles_spmd.environments.single_turn import single_turn
from miles_spmd.models import load_family
from miles_spmd.protocol.commands import DigestWeights
from miles_spmd.protocol.last_words import warn
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.telemetry.progress import Progress, open_progress
from miles_spmd.telemetry.texts import StepLines
from miles_spmd.telemetry.trackers import Trackers, open_trackers
from miles_spmd.telemetry.transcripts import cut_transcripts
from miles_spmd.types.engine_group import JUDGE, in_group
from miles_spmd.types.role import Role
from miles_spmd.types.run_files import adopt_config

WARM_TOKENS = 8  # of a response that only warms kernels


@dataclass(frozen=True)
class GenerationParts:
    """What every task is written over: the data of a run, its engines, and its record."""

    config: Config
    attempt: AttemptWriter
    data: Datasets
    generation: Generation
    journal: Journal
    stopping: Stopping
    lines: StepLines
    tracker: Trackers


@dataclass(frozen=True)
class RunParts:
    """What the loops with trainers are written over."""

    config: Config
    first: int  # step to do
    data: Datasets
    policies: list[Policy]  # one, or two in mode "rl"
    generation: Generation
    samples: Generation | RecordedSamples  # where the samples of a step come from
    journal: Journal
    checkpoints: Checkpoints
    stopping: Stopping

    @property
    def policy(self) -> Policy:
        """The first policy."""
        return self.policies[0]

    def refit(self) -> None:
        """Give all engines the weights with which the run begins."""
        for policy in self.policies:
            policy.refit(self.first)


@contextmanager
def open_generation(
    config: Config,
    cluster: Cluster,
    attempt: AttemptWriter,
    stopping: Stopping,
    observers: Sequence[Observer] = (),
) -> Iterator[GenerationParts]:
    """Build the parts of a run that generate and record, and wait for the ranks. ``observers``: of the run's events.

    An "eval" reads no training data.
    """
    task = attempt.record.task
    with ExitStack() as stack:
        tokenizer = Tokenizer(config.model.hf_checkpoint)
        others = [term for one in config.eval_sets for term in one.terms]
        judge = EngineJudge(config, cluster) if config.has_judge else None
        log = attempt.folder / "rewards.log"
        rewards = None
        if config.scores(task):
            rewards = stack.enter_context(RewardPool(config.reward, others, log, judge.submit if judge else None))
        host = stack.enter_context(closing(_host(config, tokenizer, attempt, cluster)))
        tracker = stack.enter_context(open_trackers(config))
        progress = stack.enter_context(open_progress(config, training=task != "eval"))
        lines = StepLines(config.run.name, 0 if task == "eval" else config.run.num_rollout)
        metrics = Metrics(cluster, config.run_dir)  # its clock starts here: the first step includes the start
        stopping.show, stopping.show_left = partial(_note, progress, attempt, lines), progress.left
        cluster.cells.show = partial(_warn, attempt, lines)
        writers = Writers(config, tracker, progress, attempt, lines)
        hooks = [] if config.run.phase_hook is None else [Hook(config.run.phase_hook)]
        journal = Journal(metrics, [writers, *observers, stopping, *hooks, *injected(config, cluster, attempt)])
        # Data before ranks: an error in a file is reported at once, not after minutes of loading weights.
        data = Datasets(config, tokenizer, training=task != "eval", scored=config.scores(task))
        with journal.timed("start", 0):
            cluster.wait_ready()
        journal.publish(events.RanksReady(time.time() - attempt.record.start, cluster.seconds))
        generation = Generation(config, cluster, rewards, data, journal, stopping, host, judge)
        cluster.engines[JUDGE].replacements = config.rollout.engine_replacements
        yield GenerationParts(config, attempt, data, generation, journal, stopping, lines, tracker)


@contextmanager
def open_parts(
    config: Config, cluster: Cluster, attempt: AttemptWriter, stopping: Stopping, recorded: Path | None = None
) -> Iterator[RunParts]:
    """Build the parts of a run with trainers, wait for the ranks, and load the checkpoint that the configuration names.

    Only "train" and "replay" write a ledger, unless the configuration turns it off. ``recorded``: the folder of a run
    whose samples are taken, instead of generating them. For "warm" responses are short and all groups are trained on.
    """
    task = attempt.record.task
    if task == "warm":
        short = {"rollout_max_response_len": min(WARM_TOKENS, config.rollout.rollout_max_response_len)}
        config = config.model_copy(
            update={
                "rollout": config.rollout.model_copy(update=short),
                "algorithm": config.algorithm.model_copy(update={"dynamic_sampling_filter": None}),
            }
        )
    checkpoints = Checkpoints(config, cluster)
    with ExitStack() as stack:
        durable = None
        if task == "train" and config.rollout.durable:
            durable = stack.enter_context(closing(DurableTurns(config)))
        observers: list[Observer] = [checkpoints, *([] if durable is None else [durable])]
        parts = stack.enter_context(open_generation(config, cluster, attempt, stopping, observers))
        data, generation, journal = parts.data, parts.generation, parts.journal
        start = checkpoints.load()
        if config.resilience.cells > 1:
            cluster.cells.found(start.step)
        adopt_config(config.run_dir)
        attempt.ready(start.step, [info.host for info in cluster.infos])
        if task in ("train", "replay") and config.determinism.ledger:
            roles = [Role.ACTOR, *([Role.CRITIC] if config.has_critic else [])]
            weights = {
                in_group(name, role): cluster.call(DigestWeights(role), step=start.step, group=name)
                for name in config.policies
                for role in roles
            }
            journal.ledger = LedgerRecorder(config, start, cluster.world_size, weights)
        if task == "train":
            # What was loaded is good, so the run goes on from there, and nothing stays of the steps that it repeats.
            # The checkpoints go first: a resume after a crash at any line here comes to the same.
            checkpoints.rewind(start.step)
            parts.tracker.rewind(start.step)
            cut_transcripts(config, start.step)
        if durable is not None:
            ledger = journal.ledger
            durable.begin(start.step, lambda: {} if ledger is None else ledger.weights)
            generation.durable = durable
        if journal.ledger is not None:
            journal.ledger.begin()
            stack.enter_context(closing(journal.ledger))
        policies = []
        for name in config.policies:
            parity = Parity(config.determinism, recorded=recorded is not None)
            policies.append(Policy(config, cluster, journal, parity, start.baselines, name))
        if task == "train":  # what is done again is generated again
            generation.resume(start.step, checkpoints.responses)
            checkpoints.backlog = generation.backlog
            checkpoints.baselines = partial(all_baselines, policies)
        cluster.abandons = stopping.must_leave
        if config.refit.update_weights_interval == 1:  # else the trainer no longer has the engine's weights
            for name in config.policies:
                cluster.engines[name].replacements = config.rollout.engine_replacements
        cluster.pipelined = config.megatron.get("pipeline_model_parallel_size", 1) > 1
        samples = generation if recorded is None else RecordedSamples(recorded, data, journal)
        stack.enter_context(checkpoints.completed(journal))
        yield RunParts(config, start.step, data, policies, generation, samples, journal, checkpoints, stopping)


def _host(config: Config, tokenizer: Tokenizer, attempt: AttemptWriter, cluster: Cluster) -> Host:
    """Return what runs the environment: a single response needs no process of its own."""
    folder, date = Path(config.model.hf_checkpoint), config.data.chat_template_date
    vocab_size = load_family(folder).vocab_size
    starts = [config.of_policy(name).model.hf_checkpoint for name in config.policies]
    context = min(load_family(start).max_sequence_length for start in starts)
    if config.environment.environment == SINGLE_TURN or not config.generates(attempt.record.task):
        return InPlace(single_turn, ModelView(tokenizer, vocab_size, context, date))
    if config.run.mode == "rl":  # a trajectory has to be in one micro-batch
        context = min(context, config.micro_batch_tokens)
    log = attempt.folder / "environments.log"
    return EnvironmentPool(config.environment, ModelSource(folder, vocab_size, context, date), log, cluster.wake)


def _warn(attempt: AttemptWriter, lines: StepLines, text: str) -> None:
    """Print a warning that whoever follows the run later has to see, too."""
    warn(text)
    attempt.tell(f"{lines.name}: warning: {text}")


def _note(progress: Progress, attempt: AttemptWriter, lines: StepLines, text: str) -> None:
    """Show a line about the run where it is watched, now or later."""
    progress.note(text)
    attempt.tell(f"{lines.name}: {text}")
