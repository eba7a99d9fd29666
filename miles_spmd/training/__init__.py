"""Megatron-core trains: the networks of a rank, their optimizers and checkpoints."""

import logging
import warnings

# What Megatron tells its own users, in every run: that GPTModel gets no new features, and that it computes by itself
# what its own training loop passes.
logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
    lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
)
logging.getLogger("megatron.core.distributed.distributed_data_parallel").addFilter(
    lambda record: "full_param_layout not provided" not in record.getMessage()
)
for _beginning in ("absl.logging is not installed", "MimoModelConfig is experimental"):  # it imports what is not used
    warnings.filterwarnings("ignore", _beginning, UserWarning)
