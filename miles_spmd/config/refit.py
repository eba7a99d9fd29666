"""`[refit]`: how the engine receives new weights."""

from __future__ import annotations

from miles_spmd.config.rules import ERRORS, Messages, Settings, rule
from miles_spmd.config.table import PositiveInt, Table


class RefitConfig(Table):
    update_weights_interval: PositiveInt = 1
    """Give the engine new weights every n rollouts."""
    refit_checksums: bool = True
    """Compare checksums of every bucket after each refit; a mismatch stops the run."""
    refit_bucket_mib: PositiveInt = 256
    """MiB of the buckets in which weights are copied, sent and compared."""


@rule(ERRORS)
def _lagging_rollouts(s: Settings) -> Messages:
    for name, interval in (("checkpoint.save_interval", s.save_interval), ("eval.eval_interval", s.eval_interval)):
        if interval % s.update_weights_interval:
            yield (
                f"{name}: {interval} is not a multiple of update_weights_interval {s.update_weights_interval}; saving "
                "and evaluating refit the engine, which would shorten the interval; set it to a multiple"
            )
