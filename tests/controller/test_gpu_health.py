"""Metrics and warnings from what GPUs report."""

from __future__ import annotations

from miles_spmd.controller.journal.gpu_health import GpuHealthWatch
from miles_spmd.types.gpu_health import GpuHealth


def test_each_trouble_of_a_gpu_is_said_once() -> None:
    warnings: list[str] = []
    watch = GpuHealthWatch(warnings.append)
    hot = GpuHealth("GPU-1", 91, 3, 0, ["heat"])
    lost = GpuHealth("GPU-2", 40, 0, 1, xids=[79])
    metrics = watch.add([("node-a", hot), ("node-a", GpuHealth("GPU-2", 41, 0, 0)), ("node-a", lost)])
    assert metrics == {
        "health/temperature": 91.0,
        "health/throttled": 1.0,
        "health/ecc_corrected": 3.0,
        "health/ecc_uncorrected": 1.0,
        "health/xids": 1.0,
    }
    assert warnings == [
        "node-a, GPU-1 (91 degrees C) is throttled: heat",
        "node-a, GPU-2 (40 degrees C) has uncorrected memory errors; reset it before its next run",
        "node-a, GPU-2 (40 degrees C) reports Xid 79; see dmesg of the host",
    ]
    watch.add([("node-a", hot), ("node-a", lost)])
    assert len(warnings) == 3
    assert watch.add([]) == {}
