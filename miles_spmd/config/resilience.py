"""`[resilience]`: what a run survives without a new start."""

from typing import Annotated

from miles_spmd.config.checks import ERRORS, Messages, Settings, rule
from miles_spmd.config.run import too_short
from miles_spmd.config.table import NonNegativeInt, Seconds, Table, must_be

Cells = Annotated[int, must_be("a power of two up to 64", lambda n: 1 <= n <= 64 and not n & (n - 1))]


class ResilienceConfig(Table):
    cells: Cells = 1
    """Number of cells, each a whole replica with `--nproc-per-node` ranks. One that loses a rank is started again while
    the others go on. 1: any rank that dies ends the run, which can be resumed. docs/fault_tolerance.md."""
    cell_restarts: NonNegativeInt = 3
    """How often each cell is started again. One that has failed more often stays away, and the run goes on without."""
    standby: bool = False
    """Keep processes with all imports done for the next start of every cell. A cell comes back sooner, and every rank
    takes the memory of one more process on its host, and of a CUDA context on its GPU."""
    cell_timeout: Seconds = 5.0
    """Seconds after which a cell that is built and sends no sign of life to the others counts as lost."""
    exchange_timeout: Seconds = 60.0
    """Seconds after which a message between cells counts as lost; also those that a cell which catches up may take for
    a part of the state."""


@rule(ERRORS)
def _cells_are_heard_in_time(s: Settings) -> Messages:
    if s.cells > 1 and (problem := too_short(s.cell_timeout)):
        yield f"resilience.cell_timeout: {problem}"


@rule(ERRORS)
def _batches_are_cut_for_all_cells(s: Settings) -> Messages:
    if s.cells == 1:
        return
    if not s.reduction_leaves:
        yield (
            "train.reduction_leaves: cells need it, so that gradients do not depend on the cells "
            f"that are there: a power of two, a multiple of {s.cells} cells x the data-parallel size of each"
        )
        return  # the number of trainer ranks may be unknown
    dense = s.tensor_model_parallel_size * s.pipeline_model_parallel_size * s.context_parallel_size
    replicas, rest = divmod(s.trainer_ranks, dense)
    if not rest and s.reduction_leaves % (s.cells * replicas):
        yield (
            f"train.reduction_leaves: {s.reduction_leaves} is not a multiple of {s.cells * replicas}, which is "
            "resilience.cells x the data-parallel size of each"
        )


@rule(ERRORS)
def _what_cells_do_not_do(s: Settings) -> Messages:
    if s.cells == 1:
        return
    if s.rollout_num_gpus:
        yield "rollout.rollout_num_gpus: must be 0 with resilience.cells > 1: all ranks of a cell train and generate"
    if s.update_weights_interval > 1:
        yield (
            "refit.update_weights_interval: must be 1 with resilience.cells > 1: a cell that catches up gets the "
            "newest weights, and its engine needs the older ones of the other engines"
        )
