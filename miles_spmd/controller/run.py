"""Everything a run holds on the controller's side, and each thing the loop can ask of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import numpy as np

from miles_spmd.algorithms.rewards import GROUP_FILTERS
from miles_spmd.config import Config
from miles_spmd.controller import checkpoints
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.evaluation import eval_metrics, eval_sampling, preference_metrics
from miles_spmd.controller.generation.rollout import Rollouts
from miles_spmd.controller.journal.ledger import Recorder
from miles_spmd.controller.journal.metrics import rollout_metrics, train_metrics
from miles_spmd.controller.journal.parity import Parity, describe_bisection
from miles_spmd.controller.learning.batch import optimizer_steps, pair_sequences, set_loss_weights, to_sequences
from miles_spmd.controller.learning.models import Models
from miles_spmd.controller.learning.scoring import Scores, score
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import LedgerError
from miles_spmd.protocol.messages import (
    Bisect,
    Bisection,
    CheckpointResult,
    DigestWeights,
    ExportModel,
    LoadCheckpoint,
    RefitEngine,
    RefitResult,
    SaveCheckpoint,
    SnapshotWeights,
    WeightsDigest,
)
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.telemetry.progress import open_progress
from miles_spmd.telemetry.trackers import open_trackers
from miles_spmd.telemetry.transcripts import write_transcripts
from miles_spmd.types.phase import Phase
from miles_spmd.types.request import SamplingParams
from miles_spmd.types.role import Role
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.train_sequence import TrainSequence


class TrainingDivergedError(RuntimeError):
    """Too many consecutive optimizer steps were skipped for a non-finite loss or gradient."""


class Run:
    """One run's data, reward pool, trackers and connected workers. A context manager: leaving it closes all of them."""

    def __init__(self, config: Config, workers: Cluster) -> None:
        self.config = config
        self.workers = workers
        self.models = Models(config, workers)
        self.tokenizer = Tokenizer(config.model.hf_checkpoint)
        name = config.algorithm.dynamic_sampling_filter
        self._filter = None if name is None else GROUP_FILTERS.resolve(name)
        self._parity = Parity(config.determinism)
        self._metrics: dict[str, float] = {}
        self._train_metrics: list[dict[str, float]] = []
        self._skipped_in_a_row = 0
        self._ledger: Recorder | None = None
        self._loaded: tuple[str, list[CheckpointResult]] = "", []  # a ledger's hash, and what the checkpoint had
        self._recorded: Path | None = None  # the run whose answers are taken
        self._engine_version = -1
        self._evaluated = -1

    def __enter__(self) -> Self:
        self._open = ExitStack()
        rewards = self._open.enter_context(RewardPool(self.config.reward))
        self._rollouts = Rollouts(
            self.workers, self.tokenizer, rewards, self.config.run.seed, self.config.determinism.counts_flips
        )
        self._trackers = self._open.enter_context(open_trackers(self.config))
        self._progress = self._open.enter_context(open_progress(self.config))
        self._step_started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    # --- beginning and end ---------------------------------------------------------------------------------------

    def read_data(self, *, training: bool) -> None:
        """Read the evaluation sets, and the training data if ``training``. Raises DataError."""
        self._data = Datasets(self.config, self.tokenizer, training=training)

    def load(self) -> int:
        """Wait for the workers, load the checkpoint that the configuration asks for; return the first step to do."""
        with self._timed("start"):
            self.workers.wait_ready()
        wanted = self.config.checkpoint
        folder = checkpoints.newest(self.config.run_dir) if wanted.resume else None
        folder = folder or wanted.load
        if folder is None:
            return 0
        state = checkpoints.read(folder)
        results = self.workers.call(LoadCheckpoint(str(folder)), step=state.step, phase=Phase.CHECKPOINT)
        if folder.absolute().is_relative_to(self.config.run_dir.absolute()):
            self._loaded = state.ledger, cast(list[CheckpointResult], results)
        return state.step

    def open_ledger(self, first: int) -> None:
        """Begin the ledger, or go on with it where the run does. Raises LedgerError."""
        if not self.config.determinism.ledger:
            return
        roles = [Role.ACTOR, *([Role.CRITIC] if self.config.has_critic else [])]
        answers = {r: self.workers.call(DigestWeights(r), step=first, phase=Phase.CHECKPOINT) for r in roles}
        weights = {role: cast(list[WeightsDigest], of_ranks) for role, of_ranks in answers.items()}
        head, optimizers = self._loaded
        ranks = len(self.workers.infos)
        self._ledger = Recorder(self.config, first, ranks, weights, continues=head, optimizers=optimizers)
        self._open.callback(self._ledger.close)

    def save(self, step: int) -> None:
        """Write a resumable checkpoint when one is due."""
        wanted = self.config.checkpoint
        last = step == self.config.run.num_rollout
        if not ((wanted.save_interval and step % wanted.save_interval == 0) or (last and wanted.save_final)):
            return
        with self._timed("save"):
            folder = checkpoints.step_folder(self.config.run_dir, step)
            folder.mkdir(parents=True, exist_ok=True)
            results = self.workers.call(SaveCheckpoint(str(folder)), step=step, phase=Phase.CHECKPOINT)
            head = ""
            if self._ledger is not None:
                self._ledger.saved(step, cast(list[CheckpointResult], results))
                head = self._ledger.head
            checkpoints.complete(folder, checkpoints.ControllerState(step, self.config.run.seed, ledger=head))

    def export(self) -> None:
        """Write the trainer's weights as a Hugging Face checkpoint into the run folder."""
        folder = self.config.checkpoint.export_dir or self.config.run_dir / "export"
        self.workers.call(ExportModel(str(folder)), step=self.config.run.num_rollout, phase=Phase.CHECKPOINT)

    def finish(self) -> None:
        if self.config.checkpoint.export_final:
            self.export()

    # --- one step ------------------------------------------------------------------------------------------------

    def take_answers(self, run_dir: Path) -> None:
        """Generate nothing: take what another run has recorded."""
        self._recorded = run_dir

    def rollout(self, step: int) -> list[list[Sample]]:
        """Answers to this step's prompts, scored: groups in submission order."""
        groups, dropped = self._generate(step) if self._recorded is None else self._read_answers(step, self._recorded)
        self._metrics |= rollout_metrics(groups) | {"rollout/dropped_groups": float(dropped)}
        if self._ledger is not None:
            with self._timed("ledger"):
                self._ledger.samples(step, groups, dropped)
        return groups

    def _read_answers(self, step: int, run_dir: Path) -> tuple[list[list[Sample]], int]:
        kept = step_data.read(run_dir, step)
        if kept is None or kept.samples is None:
            raise LedgerError(f"{step_data.path_of(run_dir, step)}: the answers of step {step} were not kept")
        wanted, waves = set(kept.samples.uids), self._data.waves(step)
        prompts: dict[str, Prompt] = {}
        while not wanted <= prompts.keys():
            prompts |= {prompt.uid: prompt for prompt in next(waves)}
        samples = kept.samples.samples(prompts)
        size = self.config.rollout.n_samples_per_prompt
        return [samples[start : start + size] for start in range(0, len(samples), size)], kept.samples.dropped

    def _generate(self, step: int) -> tuple[list[list[Sample]], int]:
        r = self.config.rollout
        with self._timed("rollout"):
            return self._rollouts.generate_until(
                r.rollout_batch_size,
                self._data.waves(step).__next__,
                self._sampling,
                samples_per_prompt=r.n_samples_per_prompt,
                step=step,
                keep=self._filter,
            )

    @property
    def _sampling(self) -> SamplingParams:
        r = self.config.rollout
        return SamplingParams(
            max_new_tokens=r.rollout_max_response_len,
            temperature=r.rollout_temperature,
            top_p=r.rollout_top_p,
            top_k=r.rollout_top_k,
            stop=r.rollout_stop,
            stop_token_ids=r.rollout_stop_token_ids,
        )

    def bisect(self, step: int) -> None:
        """Say which operator is the first whose output differs between engine and trainer, for the first token of this
        step whose log-probs do."""
        sequences = self.sequences(self.rollout(step))
        found = self._parity.first(sequences, self.models.log_probs(step, sequences, Role.ACTOR))
        if found is None:
            print(f"step {step}: engine and trainer give every token the same log-prob", flush=True)
            return
        sample, place = found
        self.workers.call(RefitEngine(step), step=step, phase=Phase.REFIT)  # the trainer had the engine's memory
        request = self._rollouts.request(sample, self._sampling, step)
        answers = self.workers.call(Bisect(request, place), step=step, phase=Phase.LOG_PROBS)
        print(describe_bisection(step, sample, place, cast(list[Bisection], answers)), flush=True)

    def sequences(self, groups: Sequence[Sequence[Sample]]) -> list[TrainSequence]:
        samples = [sample for group in groups for sample in group]
        sequences = to_sequences(samples)
        self._parity.expect(samples, sequences)
        return sequences

    def score(self, step: int, sequences: Sequence[TrainSequence]) -> Scores:
        """What the models say of the sequences before the update, as far as the algorithm asks. Raises ParityError."""
        with self._timed("log_probs"):
            scores = score(step, sequences, self.models, self.config)
        algorithm = self.config.algorithm
        generated = algorithm.keep_old_actor or self._engine_version == step  # by weights that are here
        if generated and self.config.determinism.counts_flips and self._recorded is None:  # which did not keep them
            with self._timed("log_probs"):
                role = Role.OLD_ACTOR if algorithm.keep_old_actor else Role.ACTOR
                top1, _ = self.models.top_k_tokens(step, sequences, role, 1)
            self._metrics |= self._parity.check_top1(step, sequences, top1)
        if generated and "old_log_probs" in scores and not algorithm.use_rollout_logprobs:
            self._metrics |= self._parity.check(step, sequences, scores["old_log_probs"])
        return scores

    def optimizer_steps(
        self, groups: Sequence[Sequence[Sample]], sequences: Sequence[TrainSequence], scores: Scores
    ) -> list[list[TrainSequence]]:
        """The rollout cut into optimizer steps, with advantages and global denominators."""
        samples = [sample for group in groups for sample in group]
        steps, metrics = optimizer_steps(samples, sequences, scores, self.config)
        self._metrics |= metrics
        return steps

    def examples(self, step: int) -> list[TrainSequence]:
        """This step's supervised examples, weighted to the mean over their tokens."""
        batch = [TrainSequence(example.tokens, example.loss_mask) for example in self._data.examples(step)]
        set_loss_weights(batch, "token_mean", max_response_len=0)
        return batch

    def pairs(self, step: int) -> list[TrainSequence]:
        """This step's preference pairs, weighted to the mean over pairs, with what the reference policy says of them
        where the loss asks."""
        batch = pair_sequences(self._data.pairs(step))
        if self.config.has_reference:
            with self._timed("log_probs"):
                reference = self.models.log_probs(step, batch, Role.REF)
            for sequence, log_probs in zip(batch, reference, strict=True):
                sequence.ref_log_probs = log_probs
        set_loss_weights(batch, "rollout_mean", max_response_len=0, rollout_ids=np.arange(len(batch)) // 2)
        return batch

    def train(self, step: int, batch: Sequence[TrainSequence]) -> None:
        """One optimizer step on ``batch``: of the critic, where there is one, and after its warm-up of the policy.
        Raises TrainingDivergedError after too many skipped ones in a row, and ParityError."""
        self._metrics.setdefault("train/tokens", 0.0)
        self._metrics["train/tokens"] += float(sum(len(s.tokens) for s in batch))
        if self.config.has_critic:
            self._update(step, batch, Role.CRITIC)
            if step < self.config.train.num_critic_only_steps:
                return
        log_probs = self._update(step, batch, Role.ACTOR)
        first = batch[0].rollout_log_probs is not None and "train/train_rollout_logprob_abs_diff" not in self._metrics
        if first and self._engine_version == step:  # these are still the weights that generated
            self._metrics |= self._parity.check(step, batch, log_probs)

    def _update(self, step: int, batch: Sequence[TrainSequence], role: Role) -> list[np.ndarray]:
        with self._timed("train"):
            results, scores = self.models.train(step, batch, role)
        metrics = train_metrics(results, self.workers.trainers, critic=role is Role.CRITIC)
        self._train_metrics.append(metrics)
        if self._ledger is not None:
            with self._timed("ledger"):
                self._ledger.update(role, batch, results, scores, metrics)
        self._count_skipped(step, next(r.skipped for r, rank in zip(results, self.workers.trainers) if rank.reports))
        return scores

    def record(self, step: int) -> None:
        """The ledger's entry for the step."""
        if self._ledger is not None:
            with self._timed("ledger"):
                self._ledger.step(step)

    def keep(self, step: int) -> None:
        """Make the newest weights the reference's when its refreshment is due."""
        interval = self.config.algorithm.ref_update_interval
        if self.config.has_reference and interval and step % interval == 0:
            self.workers.call(SnapshotWeights(Role.REF), step=step, phase=Phase.TRAIN)

    def refit(self, version: int) -> None:
        """Give the newest weights, as ``version``, to an engine that generates with them next."""
        first, interval = self._engine_version < 0, self.config.refit.update_weights_interval
        if self.config.run.mode == "rl" and (first or version % interval == 0):
            self._fill_engine(version)

    def _fill_engine(self, version: int) -> None:
        if version == self._engine_version:
            return
        with self._timed("refit"):
            results = cast(list[RefitResult], self.workers.call(RefitEngine(version), step=version, phase=Phase.REFIT))
        self._engine_version = version
        self._metrics["refit/bytes"] = float(sum(r.bytes_local + r.bytes_received for r in results))
        self._metrics["refit/checksum_mismatches"] = float(sum(r.checksum_mismatches for r in results))
        if self.config.algorithm.keep_old_actor:
            self.workers.call(SnapshotWeights(Role.OLD_ACTOR), step=version, phase=Phase.REFIT)

    def evaluate(self, step: int) -> None:
        """Score the held-out sets with the newest weights, when an evaluation is due."""
        if not self._eval_due(step):
            return
        if self.config.trains_on_pairs:
            with self._timed("eval"):
                for name, pairs in self._data.eval_pairs.items():
                    self._metrics |= preference_metrics(name, pairs, self.models, self.config)
        else:
            self._fill_engine(step)
            self._generate_and_score(step)
        self._evaluated = step

    def _generate_and_score(self, step: int) -> None:
        with self._timed("eval"):
            sets = {
                name: self._rollouts.generate(
                    prompts,
                    eval_sampling(self.config),
                    samples_per_prompt=self.config.eval.n_samples_per_eval_prompt,
                    step=0,  # the same seeds in every evaluation
                )
                for name, prompts in self._data.eval_sets.items()
            }
        self._metrics |= eval_metrics(sets)
        write_transcripts(self.config, step, sets)

    def report(self, done: int) -> None:
        """Log what happened since the last report, ``done`` steps into the run, and move the progress bar."""
        for name in {name for metrics in self._train_metrics for name in metrics}:
            self._metrics[name] = float(np.mean([m[name] for m in self._train_metrics if name in m]))
        now = time.monotonic()
        seconds = self._metrics["perf/step_time"] = now - self._step_started
        if "train/tokens" in self._metrics:
            rate = self._metrics["train/tokens"] / seconds / len(self.workers.infos)
            self._metrics["perf/tokens_per_gpu_per_second"] = rate
        self._metrics |= self.workers.take_memory()
        self._trackers.log(done, self._metrics)
        self._progress.update(done, self._metrics)
        self._step_started, self._metrics, self._train_metrics = now, {}, []

    # --- inside --------------------------------------------------------------------------------------------------

    def _eval_due(self, step: int) -> bool:
        interval = self.config.eval.eval_interval
        ends = step == self.config.run.num_rollout or self._evaluated < 0
        sets = self._data.eval_sets or self._data.eval_pairs
        return bool(sets and interval) and (ends or step % interval == 0)

    def _count_skipped(self, step: int, skipped: str) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row > self.config.train.max_skipped_steps:
            raise TrainingDivergedError(
                f"step {step}: {self._skipped_in_a_row} optimizer steps in a row were skipped, last for a {skipped}; "
                "lower megatron.lr or megatron.clip_grad, and see in metrics.jsonl where it began"
            )

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._progress.phase(phase)
        started = time.monotonic()
        yield
        name = f"perf/{phase}_time"
        self._metrics[name] = self._metrics.get(name, 0.0) + time.monotonic() - started
