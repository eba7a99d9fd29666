"""Samples that another run recorded in its ledger's data, in place of generated ones."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.config import Config
from miles_spmd.controller.datasets import Datasets
from miles_spmd.controller.generation.acceptance import Group
from miles_spmd.controller.journal.events import RolloutFinished
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import LedgerError
from miles_spmd.types.sample import Prompt


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
        self._journal.publish(RolloutFinished(step, groups, recorded.samples.dropped))
        return groups
