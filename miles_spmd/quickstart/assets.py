"""The quickstart's model and data, the same bytes each time: ``python -m miles_spmd.quickstart.assets FOLDER``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from miles_spmd.quickstart.checkpoint import write_random_model, write_tokenizer
from miles_spmd.quickstart.task import data_files
from miles_spmd.types.files import write_whole

SFT_ROWS, TRAIN_ROWS, HELDOUT_ROWS = 8192, 4096, 400


def build_assets(folder: Path, seed: int = 0) -> None:
    """Write ``model/`` (random weights, tokenizer) and the files of ``task.data_files`` into ``folder``.

    ``seed`` determines the weights; the data files never depend on it.
    """
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    write_tokenizer(model)
    write_random_model(model, seed)
    for name, rows in data_files(SFT_ROWS, TRAIN_ROWS, HELDOUT_ROWS).items():
        write_whole(folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m miles_spmd.quickstart.assets", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    arguments = parser.parse_args()
    build_assets(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
