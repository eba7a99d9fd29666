"""`[determinism]`: whether runs of one configuration are bitwise equal, and what a run keeps to show it."""

from __future__ import annotations

from typing import Literal

from miles_spmd.config.rules import ERRORS, Messages, Settings, rule
from miles_spmd.config.table import NonNegativeFloat, PositiveFloat, Table

BATCH_INVARIANT = ("fa3", "triton", "flashinfer")  # attention of SGLang's deterministic mode


class DeterminismConfig(Table):
    """Whether runs of one configuration are bitwise equal, and what a run keeps to show it."""

    deterministic: bool = False
    """Two runs on identical hardware and software are bitwise equal: every kernel and collective sums in a fixed order,
    and no response depends on what else the engine computes."""
    ledger: bool = True
    """Keep in `ledger/` a hash chain over what every step read and computed; see `miles-spmd ledger`, `diff`, `replay`.
    """
    ledger_data_gib: NonNegativeFloat = 4.0
    """GiB of tokens, log-probs, rewards and advantages of the newest steps, kept beside the ledger. `diff` needs
    them to name the token, and `replay --phase train` reads them instead of generating. 0: keep none."""
    parity: Literal["auto", "bitwise", "off"] = "auto"
    """`bitwise`: engine and trainer compute log-probs by the same batch-invariant kernels, so that they are equal; what
    prevents that is an error. `auto`: the same where nothing prevents it, else `off`, and the log gives the reason."""
    parity_gate: Literal["warn", "mask", "stop"] | None = None
    """What happens when engine and trainer differ by more than is allowed. With `bitwise` no difference is. `warn`: one
    warning; `mask`: the tokens are not trained on, which takes a forward pass beforehand; `stop`: the run ends and
    names the first one. The default is `stop`, and `warn` where `auto` has chosen."""
    mismatch_budget: dict[Literal["mean", "p999", "max", "k3", "top1_flips"], PositiveFloat] = {}
    """How far log-probs of engine and trainer may differ without `bitwise`, by what is measured of a step: mean, 99.9th
    percentile and maximum of the absolute difference, k3 of the KL divergence, and the share of places with different
    top-1 tokens, which takes a forward pass beforehand. It depends on model and dtype."""

    @property
    def counts_flips(self) -> bool:
        return "top1_flips" in self.mismatch_budget

    @property
    def masks_tokens(self) -> bool:
        return self.parity_gate == "mask" and (self.parity == "bitwise" or bool(self.mismatch_budget))


@rule(ERRORS)
def _engine_is_deterministic(s: Settings) -> Messages:
    if not s.deterministic:
        return
    if s.attention_backend not in (None, *BATCH_INVARIANT):
        yield (
            f"sglang.attention_backend: with determinism.deterministic take one of {', '.join(BATCH_INVARIANT)}; the "
            f"result of {s.attention_backend!r} depends on what else is in the batch"
        )
    if s.schedule_policy == "random":
        yield "sglang.schedule_policy: 'random' has no seed, so determinism.deterministic cannot hold"
    if s.enable_torch_compile:
        yield "sglang.enable_torch_compile: determinism.deterministic cannot hold; kernels are chosen by timing them"
    for name in ("enable_nccl_nvls", "enable_symm_mem", "enable_mscclpp", "enable_torch_symm_mem"):
        if s[name]:
            yield f"sglang.{name}: determinism.deterministic cannot hold; its reduction order is not fixed"


@rule(ERRORS)
def _trainer_is_deterministic(s: Settings) -> Messages:
    for name in ("nccl_ub", "tp_comm_overlap"):
        if s.deterministic and s[name]:
            yield f"megatron.{name}: determinism.deterministic cannot hold; its reduction order is not fixed"


@rule(ERRORS)
def _budget_of_a_mask(s: Settings) -> Messages:
    budget = s.mismatch_budget
    if s.parity != "bitwise" and s.parity_gate == "mask" and budget and "max" not in budget:
        yield "determinism.mismatch_budget: parity_gate = 'mask' needs `max`, beyond which a token is masked"
