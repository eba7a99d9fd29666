"""`[run]`: what kind of run this is, how long it is, and where it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from miles_spmd.config.table import PositiveInt, Table


class RunConfig(Table):
    mode: Literal["rl", "sft", "dpo", "rm"] = "rl"
    """`rl` generates responses and trains on their rewards; `sft` trains on the responses in the data; `dpo` trains the
    policy, and `rm` a reward model, on pairs of a preferred and a rejected response."""
    name: str = "run"
    """Name of the run and of its folder."""
    output_dir: Path = Path("runs")
    """The run writes everything into `output_dir/name`: resolved configuration, metrics.jsonl, checkpoints, report."""
    seed: int = 1234
    """All randomness (data order, sampling, initialisation) is a function of this number and of identities."""
    overwrite: bool = False
    """Delete what an earlier run has left in the run folder: results, checkpoints, export. Without it, and without
    `checkpoint.resume`, a run does not start in a folder that has results."""
    num_rollout: PositiveInt = 100
    """Number of rollouts (`rl`) or of optimizer steps (other modes) in the run."""

    @property
    def trains_on_pairs(self) -> bool:
        return self.mode in ("dpo", "rm")
