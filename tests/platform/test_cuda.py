"""How a rank gets torch_memory_saver's hook. That the hook works is seen in tests/gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles_spmd.platform.cuda import require_memory_saver

PROGRAM = """
import os, sys
from miles_spmd.platform.cuda import prepare
print("started", flush=True)
prepare()
print(os.environ.get("LD_PRELOAD"), sys.argv[1:])
print(os.environ["NCCL_CUMEM_ENABLE"], os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], "pinned" in str(os.environ))
"""
SETTINGS = "1 1 False"  # the user's own, ours, and nothing beside the user's PYTORCH_ALLOC_CONF


def run(site: Path) -> list[str]:
    """What PROGRAM prints where ``site`` has the packages."""
    environment = os.environ | {
        "NCCL_CUMEM_ENABLE": "1",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
        "PYTHONPATH": os.pathsep.join([str(site), os.getcwd()]),
        "LD_PRELOAD": "libm.so.6",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "a", "b c"], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.splitlines()


def install(site: Path, cuda: str) -> Path:
    """torch and torch_memory_saver as far as it goes without a GPU; returns the hook for CUDA 13."""
    for name in ("torch", "torch_memory_saver"):
        (site / name).mkdir()
        (site / name / "__init__.py").touch()
    (site / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\ncuda: Optional[str] = {cuda}\n")
    for major in (12, 13):
        library = site / "nvidia" / f"cu{major}" / "lib" / f"libcudart.so.{major}"
        library.parent.mkdir(parents=True)
        library.touch()
        hook = site / f"torch_memory_saver_hook_mode_preload_cu{major}.abi3.so"
        hook.touch()
    return hook


def test_starts_again_with_the_hook(tmp_path: Path) -> None:
    hook = install(tmp_path, "'13.0'")
    runtime = tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    assert run(tmp_path) == ["started", "started", f"{runtime}:{hook}:libm.so.6 ['a', 'b c']", SETTINGS]


def test_goes_on_without_a_gpu_build_of_torch(tmp_path: Path) -> None:
    install(tmp_path, "None")
    assert run(tmp_path) == ["started", "libm.so.6 ['a', 'b c']", SETTINGS]


def test_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"not in this process: start ranks with `miles-spmd`, or set LD_PRELOAD"):
        require_memory_saver()


def test_refuses_an_allocator_that_maps_memory_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.8,expandable_segments:True")
    with pytest.raises(RuntimeError, match="unset expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF"):
        require_memory_saver()
