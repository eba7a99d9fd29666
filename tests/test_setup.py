"""launch/setup.sh: which Python it takes, and what it says where it has none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that setup.sh reads, and ``bin``, whose Pythons are of another version."""
    folder = tmp_path / "checkout"
    for file in ("launch/setup.sh", "launch/requirements-cpu.txt", "pyproject.toml", "CMakeLists.txt"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((ROOT / file).read_bytes())
    for name in ("kernels", "miles_spmd"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    for name in ("python3", "python3.12", "uv"):
        program(tmp_path / "bin" / name, "exit 1")
    return folder


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def error_of_setup(checkout: Path) -> str:
    around = checkout.parent
    env = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    env |= {"PATH": f"{around / 'bin'}:/usr/bin:/bin", "PYENV_ROOT": str(around / "pyenv"), "HOME": str(around)}
    done = subprocess.run(["bash", "launch/setup.sh"], cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr


def test_no_python(checkout: Path) -> None:
    assert "setup: error: Python 3.12 is required and was not found; install it" in error_of_setup(checkout)


@pytest.mark.parametrize("where", ["bin/python3.12", "pyenv/versions/3.12.9/bin/python"])
def test_a_python_is_found(checkout: Path, where: str) -> None:
    python = checkout.parent / where
    program(python, '[ "$1" = -c ]')  # of the version, but without venv
    assert f"setup: error: {python.name if where[:3] == 'bin' else python} cannot create" in error_of_setup(checkout)


def test_uvs_python_is_found(checkout: Path) -> None:
    python = checkout.parent / "uv" / "python"
    program(python, '[ "$1" = -c ]')
    program(checkout.parent / "bin" / "uv", f"echo {python}")
    assert f"setup: error: {python} cannot create" in error_of_setup(checkout)


def test_an_environment_of_another_python_is_refused(checkout: Path) -> None:
    program(checkout / ".venv/bin/python", '[ "$1" = --version ] && echo Python 3.11.7')
    said = error_of_setup(checkout)
    assert said == (
        "setup: error: .venv has Python 3.11.7, and 3.12 is required; remove it (rm -r .venv) and run this again\n"
    )
