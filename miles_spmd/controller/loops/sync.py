"""The training loop, on one page. What each line does stands in :mod:`miles_spmd.controller.run`."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.config import Config
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.run import Run
from miles_spmd.protocol.order import Replay


def run(config: Config, workers: Cluster, task: str = "train", wanted: Replay | None = None) -> None:
    """Do ``task`` ("train", "eval", "export", or "replay" or "bisect" of what is ``wanted``) with connected workers.
    Raises what went wrong, as one clear error."""
    with Run(config, workers) as r:
        if task != "export":
            r.read_data(training=task != "eval")
        first = r.load()
        if task == "train":
            train(r, first)
        elif wanted is not None and task == "bisect":
            bisect(r, first, wanted)
        elif wanted is not None:
            replay(r, first, wanted)
        elif task == "eval":
            r.evaluate(first)
            r.report(first)
        else:
            r.export()


def train(r: Run, first: int) -> None:
    """Steps ``first`` .. num_rollout - 1; the trainer's weights before step i are version i, in the engine too."""
    r.open_ledger(first)
    r.refit(first)
    r.evaluate(first)
    r.report(first)
    for step in range(first, r.config.run.num_rollout):
        advance(r, step)
        r.record(step)
        r.evaluate(step + 1)
        r.save(step + 1)
        r.report(step + 1)
    r.finish()


def replay(r: Run, first: int, wanted: Replay) -> None:
    """The same steps again, up to the wanted one, into a ledger of their own."""
    r.open_ledger(first)
    if wanted.phase == "train":
        r.take_answers(Path(wanted.run))
    r.refit(first)
    for step in range(first, wanted.step):
        advance(r, step)
        r.record(step)
    if wanted.phase == "rollout":
        r.rollout(wanted.step)
    else:
        advance(r, wanted.step)
    r.record(wanted.step)


def bisect(r: Run, first: int, wanted: Replay) -> None:
    """The steps before the wanted one again, and then what in it engine and trainer compute otherwise."""
    r.refit(first)
    for step in range(first, wanted.step):
        advance(r, step)
    r.bisect(wanted.step)


def advance(r: Run, step: int) -> None:
    match r.config.run.mode:
        case "rl":
            reinforce(r, step)
        case "sft":
            r.train(step, r.examples(step))  # one optimizer step on the answers in the data
        case "dpo" | "rm":
            r.train(step, r.pairs(step))  # ... on pairs of a preferred and a rejected answer


def reinforce(r: Run, step: int) -> None:
    """One rollout and the optimizer steps on it."""
    groups = r.rollout(step)  # prompts -> scored samples, groups in submission order
    sequences = r.sequences(groups)
    scores = r.score(step, sequences)  # old and reference log-probs, values, the teacher's view: what is asked for
    for batch in r.optimizer_steps(groups, sequences, scores):  # advantages, global denominators
        r.train(step, batch)
    r.keep(step + 1)  # the reference policy, when it is to follow
    r.refit(step + 1)  # trainer -> engine
