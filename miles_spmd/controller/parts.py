"""The parts of a run, built in order and closed in reverse, also where building one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from miles_spmd.config import Config
from miles_spmd.controller.checkpoints import Checkpoints, Start
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.generation import Generation
from miles_spmd.controller.generation.recorded import RecordedSamples
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.controller.journal.ledger import LedgerRecorder
from miles_spmd.controller.journal.metrics import Metrics
from miles_spmd.controller.journal.observers import Observer, ProgressObserver, TrackerObserver, TranscriptObserver
from miles_spmd.controller.journal.parity import Parity
from miles_spmd.controller.learning.policy import Policy
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.protocol.commands import DigestWeights
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.telemetry.progress import open_progress
from miles_spmd.telemetry.trackers import open_trackers
from miles_spmd.types.role import Role


@dataclass(frozen=True)
class RunParts:
    """What the loops are written over."""

    config: Config
    first: int  # step to do
    data: Datasets
    policy: Policy
    generation: Generation
    samples: Generation | RecordedSamples  # where the samples of a step come from
    journal: Journal
    checkpoints: Checkpoints


@contextmanager
def open_parts(
    config: Config, cluster: Cluster, *, training: bool = True, ledger: bool = False, recorded: Path | None = None
) -> Iterator[RunParts]:
    """Build the parts of a run, wait for the ranks, and load the checkpoint that the configuration names.

    ``training``: read the training data, too. ``ledger``: write the ledger, unless the configuration turns it off.
    ``recorded``: the folder of a run whose samples are taken, instead of generating them.
    """
    with ExitStack() as stack:
        tokenizer = Tokenizer(config.model.hf_checkpoint)
        rewards = stack.enter_context(RewardPool(config.reward))
        tracker = stack.enter_context(open_trackers(config))
        progress = stack.enter_context(open_progress(config, training=training))
        metrics = Metrics(cluster)  # its clock starts here: the first step includes the start
        observers: list[Observer] = [TrackerObserver(tracker), ProgressObserver(progress), TranscriptObserver(config)]
        # Data before ranks: an error in a file is reported at once, not after minutes of loading weights.
        data = Datasets(config, tokenizer, training=training)
        with Journal(metrics, observers).timed("start"):
            cluster.wait_ready()
        checkpoints = Checkpoints(config, cluster)
        start = checkpoints.load()
        recorder = None
        if ledger and config.determinism.ledger:
            recorder = stack.enter_context(closing(_open_ledger(config, cluster, start)))
        journal = Journal(metrics, observers, recorder)
        parity = Parity(config.determinism, recorded=recorded is not None)
        policy = Policy(config, cluster, journal, parity)
        generation = Generation(config, cluster, tokenizer, rewards, data, journal)
        samples = generation if recorded is None else RecordedSamples(config, recorded, data, journal)
        yield RunParts(config, start.step, data, policy, generation, samples, journal, checkpoints)


def _open_ledger(config: Config, cluster: Cluster, start: Start) -> LedgerRecorder:
    roles = [Role.ACTOR, *([Role.CRITIC] if config.has_critic else [])]
    weights = {role: cluster.call(DigestWeights(role), step=start.step) for role in roles}
    ranks = len(cluster.infos)
    return LedgerRecorder(config, start.step, ranks, weights, continues=start.ledger, optimizers=start.results)
