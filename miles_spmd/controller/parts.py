"""The parts of a run, built in order and closed in reverse, also where building one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from miles_spmd.config import Config
from miles_spmd.controller.checkpoints import Checkpoints
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.generation import Generation, RecordedSamples
from miles_spmd.controller.journal.journal import Journal, Writers
from miles_spmd.controller.journal.ledger import LedgerRecorder
from miles_spmd.controller.journal.metrics import Metrics
from miles_spmd.controller.journal.parity import Parity
from miles_spmd.controller.learning.policy import Policy
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.protocol.commands import DigestWeights
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.telemetry.progress import open_progress
from miles_spmd.telemetry.trackers import open_trackers
from miles_spmd.types.role import Role

WARM_TOKENS = 8  # of a response that only warms kernels


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
def open_parts(config: Config, cluster: Cluster, task: str, recorded: Path | None = None) -> Iterator[RunParts]:
    """Build the parts of a run, wait for the ranks, and load the checkpoint that the configuration names.

    An "eval" reads no training data, and only "train" and "replay" write a ledger, unless the configuration turns it
    off. ``recorded``: the folder of a run whose samples are taken, instead of generating them. For "warm" responses
    are short and all groups are trained on.
    """
    if task == "warm":
        short = {"rollout_max_response_len": min(WARM_TOKENS, config.rollout.rollout_max_response_len)}
        config = config.model_copy(
            update={
                "rollout": config.rollout.model_copy(update=short),
                "algorithm": config.algorithm.model_copy(update={"dynamic_sampling_filter": None}),
            }
        )
    with ExitStack() as stack:
        tokenizer = Tokenizer(config.model.hf_checkpoint)
        others = [term for one in config.eval_sets for term in one.terms]
        rewards = stack.enter_context(RewardPool(config.reward, others, config.run_dir / "logs" / "rewards.log"))
        tracker = stack.enter_context(open_trackers(config))
        progress = stack.enter_context(open_progress(config, training=task != "eval"))
        metrics = Metrics(cluster, config.run_dir)  # its clock starts here: the first step includes the start
        journal = Journal(metrics, [Writers(config, tracker, progress)])
        # Data before ranks: an error in a file is reported at once, not after minutes of loading weights.
        data = Datasets(config, tokenizer, training=task != "eval")
        with journal.timed("start"):
            cluster.wait_ready()
        checkpoints = Checkpoints(config, cluster)
        start = checkpoints.load()
        if task in ("train", "replay") and config.determinism.ledger:
            roles = [Role.ACTOR, *([Role.CRITIC] if config.has_critic else [])]
            weights = {role: cluster.call(DigestWeights(role), step=start.step) for role in roles}
            recorder = LedgerRecorder(config, start, len(cluster.infos), weights)
            journal.ledger = stack.enter_context(closing(recorder))
        parity = Parity(config.determinism, recorded=recorded is not None)
        policy = Policy(config, cluster, journal, parity)
        generation = Generation(config, cluster, tokenizer, rewards, data, journal)
        samples = generation if recorded is None else RecordedSamples(config, recorded, data, journal)
        yield RunParts(config, start.step, data, policy, generation, samples, journal, checkpoints)
