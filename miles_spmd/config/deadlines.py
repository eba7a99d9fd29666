"""`[deadlines]`: how long a run waits before it ends with a report."""

from __future__ import annotations

from miles_spmd.config.table import PositiveFloat, Table


class DeadlinesConfig(Table):
    """Seconds after which the wait for something ends the run with a report of where each rank stands."""

    start_timeout: PositiveFloat = 900.0
    """Seconds until all ranks have joined the run and built trainer and engine."""
    rollout_timeout: PositiveFloat = 3600.0
    """Seconds of one rollout or evaluation."""
    train_timeout: PositiveFloat = 1800.0
    """Seconds of the training phase of one step, and of one call of your own function by the controller."""
    refit_timeout: PositiveFloat = 600.0
    """Seconds of one refit."""
    checkpoint_timeout: PositiveFloat = 1800.0
    """Seconds in which a checkpoint is written, loaded or exported."""
    heartbeat_timeout: PositiveFloat = 60.0
    """Seconds without a heartbeat of a rank after which it counts as lost."""
