"""The lock, the project's requirements and the doctor's pins say the same."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from miles_spmd import doctor

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


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
    for requirement in [*requirements(), *requirements("dev")]:
        assert lock[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_the_doctor_knows_the_same_versions() -> None:
    lock = locked()
    assert doctor.TORCH_PINS["cpu"] == lock["torch"]
    assert {name: lock[name] for name in doctor.PINS} == doctor.PINS
    cuda = {r.name: str(r.specifier).removeprefix("==") for r in requirements("cuda")}
    assert cuda == doctor.CUDA_PINS | {"torch": doctor.TORCH_PINS["cuda"], "sglang": doctor.PINS["sglang"]}


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
