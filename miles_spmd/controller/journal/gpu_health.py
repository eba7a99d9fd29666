"""The health of all GPUs of a run: its metrics, and one warning for each kind of trouble of each GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from miles_spmd.protocol.last_words import warn
from miles_spmd.types.gpu_health import GpuHealth


class GpuHealthWatch:
    """``warn`` receives the warnings."""

    def __init__(self, warn: Callable[[str], None] = warn) -> None:
        self._warn, self._warned = warn, set[tuple[str, str]]()

    def add(self, found: Iterable[tuple[str, GpuHealth]]) -> dict[str, float]:
        """Take what was read in a step, each with its host, and return the metrics; none where nothing was read. Of
        several readings of a GPU the last counts, with the error reports of all."""
        newest: dict[str, GpuHealth] = {}
        for host, gpu in found:
            before = newest.get(gpu.uuid)
            newest[gpu.uuid] = gpu.with_earlier(before.xids) if before else gpu
            self._judge(host, gpu)
        gpus = newest.values()
        if not gpus:
            return {}
        return {
            "health/temperature": float(max(gpu.temperature for gpu in gpus)),
            "health/throttled": float(sum(bool(gpu.throttled) for gpu in gpus)),
            "health/ecc_corrected": float(sum(gpu.corrected for gpu in gpus)),
            "health/ecc_uncorrected": float(sum(gpu.uncorrected for gpu in gpus)),
            "health/xids": float(sum(len(gpu.xids) for gpu in gpus)),
        }

    def _judge(self, host: str, gpu: GpuHealth) -> None:
        troubles = {f"is throttled: {reason}" for reason in gpu.throttled}
        troubles |= {f"reports Xid {number}; see dmesg of the host" for number in gpu.xids}
        if gpu.uncorrected:
            troubles.add("has uncorrected memory errors; reset it before its next run")
        for trouble in sorted(troubles):
            if (gpu.uuid, trouble) not in self._warned:
                self._warned.add((gpu.uuid, trouble))
                self._warn(f"{host}, {gpu.uuid} ({gpu.temperature} degrees C) {trouble}")
