"""What is read of GPUs, through a library that answers as NVML does: this machine may have neither."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from miles_spmd.platform import gpu_health
from miles_spmd.types.gpu_health import GpuHealth


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "libnvidia-ml.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, Path(__file__).with_name("nvml.c")], check=True)
    monkeypatch.setattr(gpu_health, "LIBRARY", str(library))


@pytest.mark.usefixtures("nvml")
def test_health_is_read_and_errors_are_counted_from_the_start() -> None:
    reader = gpu_health.Reader(["GPU-a", "GPU-b", "GPU-unknown"])
    well, ill = reader.read()
    assert well == GpuHealth("GPU-a", 35, 0, 0)
    assert (ill.temperature, ill.uncorrected, ill.throttled, ill.xids) == (90, 0, ["heat (hardware)"], [62, 61])
    again = reader.read()[1]
    assert again.corrected > ill.corrected
    assert again.xids == []


@pytest.mark.usefixtures("nvml")
def test_an_error_report_is_passed_on_also_if_nobody_took_it_in_time() -> None:
    monitor = gpu_health.GpuMonitor(["GPU-b"])
    monitor.start()
    for _ in range(2):
        monitor.ask()
        end = time.monotonic() + 30
        while monitor._asked.is_set() or not monitor._found:
            assert time.monotonic() < end
            time.sleep(0.01)
    time.sleep(0.1)
    (gpu,) = monitor.take()
    assert sorted(gpu.xids) == [61, 62]
    assert monitor.take() == []


def test_without_nvml_there_is_no_health() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a driver")
    with pytest.raises(OSError, match="libnvidia-ml"):
        gpu_health.Reader([])
    monitor = gpu_health.GpuMonitor([])
    monitor.start()
    monitor.ask()
    monitor.join(30)
    assert not monitor.is_alive()
    assert monitor.take() == []
