"""Adaptations by which SGLang can be imported and run on a machine without a GPU."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types

SGLANG_VERSION = "0.5.16"
TORCHVISION_MODULES = (
    "torchvision",
    "torchvision.io",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


def install() -> None:
    """Make this process ready to ``import sglang`` without a GPU. Idempotent.

    Call before the first import of sglang; transformers may be imported before or after.

    Raises RuntimeError when sglang is missing, is not version ``SGLANG_VERSION``, or was imported before.
    """
    from miles_spmd.platform.cpu import sgl_kernel_stub

    if sys.modules.get("sgl_kernel") is sgl_kernel_stub:
        return
    check_version()
    if "sglang.srt" in sys.modules:
        raise RuntimeError("sglang was imported before miles_spmd.platform.cpu.install(); call install() first")
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ["SGLANG_NCCL_SO_PATH"] = os.devnull  # a torch for CUDA comes with NCCL, which requires a GPU
    _stand_in_for_torchvision()
    sys.modules["sgl_kernel"] = sgl_kernel_stub


def check_version() -> None:
    """Raise RuntimeError unless the installed sglang has the version whose internals this project uses."""
    try:
        found = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != SGLANG_VERSION:
        raise RuntimeError(f"sglang {SGLANG_VERSION} is required, found {found}: install launch/requirements-cpu.txt")


class _Name(type):
    """Metaclass of classes that have every attribute, whose values are classes of the same kind."""

    def __getattr__(cls, name: str) -> _Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Absent(types.ModuleType):
    """A module from which every name can be imported and none can be used."""

    __path__: list[str] = []

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "0.28"  # transformers reads it; the release for torch 2.13

    def __getattr__(self, name: str) -> _Name:
        return getattr(_Name("torchvision", (), {}), name)


def _stand_in_for_torchvision() -> None:
    """Replace torchvision by modules without content if it is not installed. SGLang imports it, also through
    transformers' image processors, even for text models; its wheel requires a CUDA torch, so that the CPU
    installation does not have it."""
    if importlib.util.find_spec("torchvision") is None:
        for name in TORCHVISION_MODULES:
            sys.modules[name] = _Absent(name)
        if "transformers" in sys.modules:  # it found none, and has set a class that raises
            import transformers
            from transformers.models.auto.image_processing_auto import AutoImageProcessor

            vars(transformers)["AutoImageProcessor"] = AutoImageProcessor


def adapt() -> None:
    """Switch off, for engines on a CPU, what is meant for a server that owns the machine, or for a GPU."""
    from sglang.srt import server_args
    from sglang.srt.model_executor.model_runner import ModelRunner

    def leave_threads_alone(runner: ModelRunner) -> None:
        runner.local_omp_cpuid = None  # SGLang would bind this process to cores that it selects

    ModelRunner.init_threads_binding = leave_threads_alone
    server_args.add_deterministic_attention_backend_choices(["torch_native"])
    server_args.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
