"""Rules about runs that are to be equal bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

from miles_spmd.config.rules import CONTRADICTIONS, rule

SAME_IN_ANY_BATCH = ("fa3", "triton", "flashinfer")  # attention of SGLang's deterministic mode


@rule(CONTRADICTIONS)
def _engine_is_deterministic(
    deterministic: bool,
    attention_backend: str | None,
    schedule_policy: str,
    enable_torch_compile: bool,
    enable_nccl_nvls: bool,
    enable_symm_mem: bool,
    enable_mscclpp: bool,
    enable_torch_symm_mem: bool,
) -> Iterator[str]:
    if not deterministic:
        return
    if attention_backend not in (None, *SAME_IN_ANY_BATCH):
        yield (
            f"sglang.attention_backend: with determinism.deterministic take one of {', '.join(SAME_IN_ANY_BATCH)}; the "
            f"result of {attention_backend!r} depends on what else is in the batch"
        )
    if schedule_policy == "random":
        yield "sglang.schedule_policy: 'random' has no seed, so determinism.deterministic cannot hold"
    if enable_torch_compile:
        yield "sglang.enable_torch_compile: determinism.deterministic cannot hold; kernels are chosen by timing them"
    for name, wanted in (
        ("enable_nccl_nvls", enable_nccl_nvls),
        ("enable_symm_mem", enable_symm_mem),
        ("enable_mscclpp", enable_mscclpp),
        ("enable_torch_symm_mem", enable_torch_symm_mem),
    ):
        if wanted:
            yield f"sglang.{name}: determinism.deterministic cannot hold; ranks add up in no fixed order"


@rule(CONTRADICTIONS)
def _trainer_is_deterministic(deterministic: bool, nccl_ub: bool, tp_comm_overlap: bool) -> Iterator[str]:
    for name, wanted in (("nccl_ub", nccl_ub), ("tp_comm_overlap", tp_comm_overlap)):
        if deterministic and wanted:
            yield f"megatron.{name}: determinism.deterministic cannot hold; ranks add up in no fixed order"


@rule(CONTRADICTIONS)
def _lag_survives_a_restart(
    deterministic: bool, update_weights_interval: int, save_interval: int, eval_interval: int
) -> Iterator[str]:
    """A run that resumes gives the engine the newest weights, and so does an evaluation."""
    for name, interval in (("checkpoint.save_interval", save_interval), ("eval.eval_interval", eval_interval)):
        if deterministic and interval % update_weights_interval:
            yield (
                f"{name}: with determinism.deterministic {interval} must be a multiple of "
                f"refit.update_weights_interval = {update_weights_interval}; the engine gets the newest weights there"
            )
