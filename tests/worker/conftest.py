from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.worker.launched import Launch, Launched
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def launch(tmp_path: Path, checkpoint: Path) -> Iterator[Launch]:
    launched: list[Launched] = []

    def start(
        *deed: object,
        preloaded: bool = True,
        ranks: int = 2,
        file_kib: int = 0,
        variables: Mapping[str, str] | None = None,
        **changes: dict[str, Any],
    ) -> Launched:
        changes["rollout"] = {"engine": REFERENCE_ENGINE} | changes.get("rollout", {})
        changes["determinism"] = {"parity": "off"} | changes.get(
            "determinism", {}
        )  # not for that engine, and a run would say so
        config = write_config(tmp_path, checkpoint, **changes)
        more: dict[str, Any] = {"preloaded": preloaded, "ranks": ranks, "file_kib": file_kib, "variables": variables}
        launched.append(Launched(tmp_path, config, *map(str, deed), **more))
        return launched[-1]

    yield start
    for run in launched:
        run.clean_up()
