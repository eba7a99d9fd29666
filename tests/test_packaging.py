"""The lock, the project's requirements and the doctor's pins say the same."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from miles_spmd import doctor

REPOSITORY = Path(__file__).parents[1]
SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]


def locked() -> dict[str, str]:
    lines = (REPOSITORY / "launch" / "requirements-cpu.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every line pins one package and names no place to get it from"
    names = {canonicalize_name(name): version for name, version in pairs}
    assert len(names) == len(pairs)
    return names


def requirements(extra: str | None = None) -> list[Requirement]:
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return [Requirement(line) for line in lines]


def test_the_lock_satisfies_the_project() -> None:
    lock = locked()
    build = map(Requirement, SETTINGS["build-system"]["requires"])
    for requirement in [*requirements(), *requirements("dev"), *build]:
        assert lock[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_the_doctor_knows_the_same_versions() -> None:
    lock = locked()
    assert doctor.TORCH_PINS["cpu"] == lock["torch"]
    assert {name: lock[name] for name in doctor.PINS} == doctor.PINS
    cuda = {r.name: str(r.specifier).removeprefix("==") for r in requirements("cuda")}
    assert cuda == doctor.CUDA_PINS | {"torch": doctor.TORCH_PINS["cuda"], "sglang": doctor.PINS["sglang"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("c++", marks=pytest.mark.skipif(not shutil.which("c++"), reason="there is no compiler here")),
        "/never/installed/c++",
    ],
)
def test_wheels_with_a_compiler_and_without(tmp_path: Path, compiler: str) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([*command, REPOSITORY], check=True, env=os.environ | {"CXX": compiler}, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "miles_spmd").rglob("*.py")}
    assert "miles_spmd/cli.py" in modules
    assert modules <= files
    assert "miles_spmd/telemetry/report_page.html" in files
    there = compiler == "c++"
    assert ("miles_spmd/invariant/cpu_kernels.so" in files) == there
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl" if there else "-py3-none-any.whl")


def test_no_package_host_is_named() -> None:
    for path in [*(REPOSITORY / "launch").iterdir(), REPOSITORY / ".ci" / "run", REPOSITORY / "pyproject.toml"]:
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", path.read_text()), path


def test_scripts_are_valid_and_do_not_depend_on_where_they_are_called() -> None:
    for path in [*(REPOSITORY / "launch").glob("*.sh"), REPOSITORY / ".ci" / "run"]:
        subprocess.run(["bash", "-n", path], check=True)
        assert path.stat().st_mode & 0o111, path
        text = path.read_text()
        assert "set -euo pipefail" in text, path
        assert 'cd "$(dirname "${BASH_SOURCE[0]}")' in text, path
