"""The hook is process-wide, so each case runs in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the hook is inert where CUDA is available")


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, env=os.environ.copy()
    )
    return done.stdout + done.stderr.splitlines()[-1] if done.returncode else done.stdout


def test_installs_once_and_leaves_torch_alone() -> None:
    out = python(
        "import sys, torch\n"
        "from miles_spmd.platform.cpu import megatron_hook\n"
        "real = torch.cuda\n"
        "megatron_hook.install(); megatron_hook.install()\n"
        "from megatron.core import parallel_state, tensor_parallel\n"
        "megatron_hook.install()\n"
        "print(sum(type(f).__module__ == megatron_hook.__name__ for f in sys.meta_path))\n"
        "print(torch.cuda is real, torch.cuda.is_available())\n"
        "print(parallel_state.torch.cuda is real, tensor_parallel.layers.torch is torch)\n"
    )
    assert out.split() == ["1", "True", "False", "True", "True"]


def test_torchs_compiler_is_not_imported() -> None:
    out = python(
        "import sys\n"
        "from miles_spmd.platform import cpu\n"
        "cpu.install()\n"
        "import miles_spmd.training.trainer\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    assert out.split() == ["False"]


def test_late_import_is_refused() -> None:
    out = python("import megatron.core.jit\nfrom miles_spmd.platform.cpu import megatron_hook\nmegatron_hook.install()")
    assert "megatron.core was imported before" in out


def test_other_version_is_refused() -> None:
    out = python(
        "import importlib.metadata as metadata\n"
        "from miles_spmd.platform.cpu import megatron_hook\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "for metadata.version in (missing, lambda name: '0.15.0'):\n"
        "    try: megatron_hook.install()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    missing, older = out.splitlines()
    assert missing == "megatron-core is not installed; install megatron-core==0.19.2"
    assert older.startswith("megatron-core 0.15.0 is installed")
    assert older.endswith("install megatron-core==0.19.2")


def test_cached_bytecode_follows_the_source(tmp_path) -> None:
    """A rewritten module is cached, and read from source again after the source changed."""
    out = python(
        "import sys, os; sys.dont_write_bytecode = False\n"
        "from pathlib import Path\n"
        "from miles_spmd.platform.cpu import megatron_hook\n"
        "import types; fake = types.ModuleType('fake'); fake.is_available = lambda: 'stand-in'\n"
        "megatron_hook._cuda_stand_in = lambda: fake\n"
        f"path = Path({str(tmp_path)!r}) / 'm.py'\n"
        "def load():\n"
        "    module = types.ModuleType('m'); megatron_hook._Loader('m', str(path)).exec_module(module)\n"
        "    return module.x\n"
        "path.write_text('import torch\\nx = torch.cuda.is_available()')\n"
        "print(load(), load(), len(list((path.parent / '__pycache__').iterdir())))\n"
        'path.write_text(\'x = ["cuda", "torch.cuda.FloatTensor", "barracuda"]\')\n'
        "print(load())\n"
    )
    assert out.splitlines() == ["stand-in stand-in 1", "['cpu', 'torch.FloatTensor', 'barracuda']"]
