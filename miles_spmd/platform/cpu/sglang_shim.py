"""What SGLang needs to be imported and run where there is no GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

SGLANG_VERSION = "0.5.16"

_torchvision_ops = None  # a torch.library.Library takes its definitions along when it is collected


def install() -> None:
    """Make this process ready to ``import sglang`` on a CPU-only torch. Idempotent.

    Call before the first import of sglang, and before the first model class is taken from transformers (a plain
    ``import transformers`` may come earlier): both import torchvision, whose wheel does not load on a CPU-only torch.

    Raises RuntimeError when sglang is missing, is not version ``SGLANG_VERSION``, or was imported before.
    """
    from miles_spmd.platform.cpu import sgl_kernel_stub

    if sys.modules.get("sgl_kernel") is sgl_kernel_stub:
        return
    check_version()
    if "sglang.srt" in sys.modules:
        raise RuntimeError("sglang was imported before miles_spmd.platform.cpu.install(); call install() first")
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    _define_torchvision_ops()
    sys.modules["sgl_kernel"] = sgl_kernel_stub


def check_version() -> None:
    """Raise RuntimeError unless the installed sglang is the one whose internals this project knows."""
    try:
        found = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != SGLANG_VERSION:
        raise RuntimeError(f"sglang {SGLANG_VERSION} is required, found {found}: install launch/requirements-cpu.txt")


def _define_torchvision_ops() -> None:
    """Importing torchvision fails unless these two operators exist; its library has them, where it loads."""
    import torch

    global _torchvision_ops
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise RuntimeError("sglang needs torchvision: install launch/requirements-cpu.txt")
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        _torchvision_ops = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _torchvision_ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def adapt() -> None:
    """Keep an engine built on a CPU from doing what only makes sense for a server that owns the machine."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    def leave_threads_alone(runner: ModelRunner) -> None:
        runner.local_omp_cpuid = None  # SGLang would bind this process to cores of its own choice

    ModelRunner.init_threads_binding = leave_threads_alone
