"""Who may know whom: the order of the rooms, read from every import statement of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "miles_spmd"

# A room imports from floors below its own, and never from a neighbour.
FLOORS = (
    ("types", "models"),
    ("config",),
    ("plugins", "processes", "sandbox", "services"),
    ("algorithms", "data", "faults", "invariant", "ledger", "platform", "rewards", "telemetry", "weights"),
    ("environments",),
    ("planning", "protocol"),
    ("generation", "training"),
    ("controller", "worker"),
    ("supervisor",),
    ("doctor", "launcher", "monitor"),
    ("chaos", "preflight", "slurm"),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# The same holds for the sub-rooms and files of the controller.
CONTROLLER_FLOORS = (
    ("attempts", "checkpoint_folders", "cluster", "datasets"),
    ("checkpoint_export", "journal"),
    ("checkpoints", "generation", "learning"),
    ("inputs", "parts", "run_folder"),
    ("loops",),
    ("tasks",),
    ("process",),
    ("__main__",),
)
CONTROLLER_FLOOR_OF = {room: floor for floor, rooms in enumerate(CONTROLLER_FLOORS) for room in rooms}

# They stand beside the product: they may know every room, and no room knows them.
BESIDE = ("bench", "quickstart")

BACKENDS = ("megatron", "sglang")
KNOW_BACKENDS = (
    "platform/",
    "invariant/",
    "training/",
    "generation/sglang/",
    "bench/peer_sglang.py",
    "environments/sglang_parsers.py",
)


class Import(NamedTuple):
    file: str  # relative to the package
    line: int
    module: str
    for_types: bool  # under ``if TYPE_CHECKING``

    def __str__(self) -> str:
        return f"miles_spmd/{self.file}:{self.line} imports {self.module}"

    @property
    def room(self) -> str:
        return self.file.split("/")[0].removesuffix(".py")

    @property
    def other(self) -> str:
        """The room that is imported, "" for what is not ours."""
        first, *rest = self.module.split(".")
        return rest[0] if first == "miles_spmd" and rest else ""


def imports() -> Iterator[Import]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from _imports(ast.parse(path.read_text()), str(path.relative_to(PACKAGE)), False)


def _imports(node: ast.AST, file: str, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (Import(file, child.lineno, alias.name, for_types) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert not level, f"{file}:{child.lineno}: a relative import hides where it goes"
                # ``from miles_spmd import room`` names the room, not the package
                yield from (
                    Import(
                        file,
                        child.lineno,
                        f"{module}.{alias.name}" if module == "miles_spmd" else str(module),
                        for_types,
                    )
                    for alias in names
                )
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=orelse):
                for statement in body:
                    yield from _imports(ast.Module([statement], []), file, True)
                for statement in orelse:
                    yield from _imports(ast.Module([statement], []), file, for_types)
            case _:
                yield from _imports(child, file, for_types)


ALL = list(imports())


def test_the_parser_sees_every_kind_of_import() -> None:
    source = """
import a.b
from c import d
from miles_spmd import data
if TYPE_CHECKING:
    import e
else:
    import f
def function():
    from g.h import i
"""
    found = [(i.module, i.for_types) for i in _imports(ast.parse(source), "x.py", False)]
    assert found == [
        ("a.b", False), ("c", False), ("miles_spmd.data", False), ("e", True), ("f", False), ("g.h", False),
    ]  # fmt: skip


def test_every_room_has_a_floor() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    modules = {path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert rooms | modules == {*FLOOR_OF, *BESIDE}


def test_rooms_import_from_floors_below_only() -> None:
    wrong = [
        str(i)
        for i in ALL
        if i.room in FLOOR_OF
        and i.other not in ("", i.room)
        and (i.other in BESIDE or FLOOR_OF[i.other] >= FLOOR_OF[i.room])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_controllers_rooms_import_from_floors_below_only() -> None:
    inside = [i for i in ALL if i.room == "controller"]
    assert {i.file.split("/")[1].removesuffix(".py") for i in inside} == set(CONTROLLER_FLOOR_OF)
    wrong = []
    for i in inside:
        own, other = i.file.split("/")[1].removesuffix(".py"), i.module.split(".")[2:3]
        known = i.other == "controller" and other and other[0] != own
        if known and CONTROLLER_FLOOR_OF[other[0]] >= CONTROLLER_FLOOR_OF[own]:
            wrong.append(str(i))
    assert not wrong, "\n".join(wrong)


def test_only_their_keepers_know_the_backends() -> None:
    wrong = [
        str(i)
        for i in ALL
        if i.module.split(".")[0] in BACKENDS and not i.for_types and not i.file.startswith(KNOW_BACKENDS)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module",
    [
        "miles_spmd.controller.process",
        "miles_spmd.environments.tools",
        "miles_spmd.controller.tasks",
        "miles_spmd.cli",
        "miles_spmd.planning.plan",
        "miles_spmd.telemetry.report",
        "miles_spmd.monitor.status",
        "miles_spmd.monitor.tail",
        "miles_spmd.protocol.router",
    ],
)
def test_nothing_heavy_is_loaded(module: str) -> None:
    """Not even by way of something else: the controller shares its machine with ranks that need the memory."""
    program = f"import sys, {module}; print([m for m in ('torch', 'megatron', 'sglang') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
