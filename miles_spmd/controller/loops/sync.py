"""The synchronous training loop: a step generates, trains, and gives the engine the new weights."""

from __future__ import annotations

from itertools import chain

from miles_spmd.controller.journal import events
from miles_spmd.controller.learning.batch import example_sequences, to_sequences
from miles_spmd.controller.parts import RunParts


def train(run: RunParts) -> None:
    """Do the steps from ``run.first`` to the end. The weights before step i are version i, in the engine too.

    Raises Unfinished, between two steps or inside of one, where the run was requested to stop.
    """
    steps, checkpoint = run.config.run.num_rollout, run.config.checkpoint
    run.stopping.begin(run.first)
    run.refit()
    evaluate(run, run.first, begins=True)
    run.journal.report(run.first)
    for step in range(run.first, steps):
        run.stopping.check()
        run.policy.admit(step)
        advance(run, step)
        run.generation.forget()
        run.journal.publish(events.StepFinished(step))
        evaluate(run, step + 1)
        run.checkpoints.save(step + 1, run.journal)
        run.journal.report(step + 1)
    if checkpoint.export_final:
        run.checkpoints.export_at_end(run.journal)
    run.checkpoints.finish(steps, run.journal)
    if run.generation.durable is not None:
        run.generation.durable.remove()


def leave(run: RunParts) -> str:
    """Save what a run has that was requested to stop, and return in words what that is."""
    step, why = run.stopping.step, f"stopped by {run.stopping.source}"
    if run.stopping.reported < step > run.first:
        run.journal.report(step)
    if run.stopping.updates:  # the weights are neither those before the step nor those after it
        return f"{why} in step {step}, after {run.stopping.updates} of its updates: {run.checkpoints.lost(step)}"
    responses, numbers = run.generation.unfinished(step)
    if step > run.first or responses:
        run.checkpoints.save_all(step, run.journal, responses)
    if responses:
        return f"{why} in step {step}: {numbers} are saved"
    return f"{why} before step {step}: " + ("all is saved" if step > 0 else "there is nothing to save")


def warm(run: RunParts) -> None:
    """Do one step, whose responses are short, so that every kernel is compiled."""
    run.refit()
    advance(run, run.first)


def advance(run: RunParts, step: int) -> None:
    """Train on the data of ``step``, which the mode decides."""
    match run.config.run.mode:
        case "rl":
            reinforce(run, step)
        case "sft":
            run.policy.train(step, example_sequences(run.data.batch(step)))
        case "dpo" | "rm":
            run.policy.train(step, run.policy.pair_batch(step, run.data.batch(step)))


def reinforce(run: RunParts, step: int) -> None:
    """Generate samples for the prompts of ``step``, and train each policy on those of the roles that it plays."""
    groups = run.samples.rollout(step)  # prompts -> scored samples, groups in the order of submission
    for policy in run.policies:
        samples = policy.own(list(chain.from_iterable(groups)))
        sequences = to_sequences(samples)
        scores = policy.score(step, samples, sequences)  # log-probs and values from before the update
        for batch in policy.optimizer_steps(step, samples, sequences, scores):  # advantages, global denominators
            policy.train(step, batch)
        policy.update_reference(step + 1)
        policy.refit(step + 1)  # trainer -> engine


def evaluate(run: RunParts, step: int, *, begins: bool = False) -> None:
    """Score those of the held-out sets with the newest weights that are due after ``step`` steps: all of them at both
    ends of the run, and each one at its interval."""
    ends = begins or step == run.config.run.num_rollout
    due = [one for one in run.config.eval_sets if one.eval_interval and (ends or step % one.eval_interval == 0)]
    if not due:
        return
    if run.config.trains_on_pairs:
        run.policy.evaluate(step, {one.name: run.data.eval_pairs[one.name] for one in due})
    else:
        for policy in run.policies:
            policy.refit_now(step)
        run.generation.evaluate(step, due)
