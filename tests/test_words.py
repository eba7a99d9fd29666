"""The words of code and documentation: the field's own terms, and none of the stand-ins that CONTRIBUTING.md lists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("miles_spmd", "README.md", "CONTRIBUTING.md", "docs", "configs", "launch", "kernels", "slurm")

# What to say -> the words that say it less well. A word ends where letters end, so identifiers count, too.
INSTEAD = {
    "response (an answer is a math problem's)": "answers?|answered|answering",
    "release / resume memory": "gives? up|given up|gave up|giving up|takes? back|taken back",
    "bitwise equal": "to the last bit|to the bit|the same bits|same bits|other bits",
    "head_dim": r"heads of \d+|numbers of a head|head_size",
    "reduction order, sum, partial sums": "adds? up|added up|adding up",
    "error, warning": "faults?|faulty|doubts?|contradictions?",
    "heartbeat": "beats?|beaten",
    "fix, change": "mends?|mended|mending",
    "identical hardware and software": "machines alike",
    "requires, is not supported, is derived from": "wants?|is no|are no|says it|says so|say so",
    "reports, describes": "(says?|said|tells?|told|knows?|known|speaks?|thinks?) of",
    "held-out": "held out",
    "top-1": "likeliest",
    "sample, sampled": "draws?|drawn|drew|drawing",
    "snapshot": "(make|made) the reference's",
}
ALLOWED = re.compile(
    r"rename=\{|fault[- _]toleran|(is|are) no longer|no doubt|dist_init|beats? (per|a) second|--answer-tokens|SPLIT = |"
    r"(layer|theirs)\.head_size",
    re.IGNORECASE,
)
# What `miles-spmd chaos` injects into a run is a fault.
INJECTED = ("miles_spmd/faults/", "miles_spmd/chaos/", "miles_spmd/controller/journal/faults.py")
INJECTED_LINE = re.compile(r"chaos|inject|--faults|miles_spmd[./]faults|faults/", re.IGNORECASE)
# Files about math problems and questions, whose answers are answers.
MATH = (
    *(f"miles_spmd/rewards/{name}.py" for name in ("math", "exact", "f1", "gpqa", "reasoning_gym")),
    "miles_spmd/quickstart/task.py",
)
MATH_LINE = re.compile(r"math|boxed|arithmetic|label_key|question|</?answer>", re.IGNORECASE)


def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "--", *PLACES], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split() if Path(name).suffix != ".json"]


def stand_ins(name: str) -> list[str]:
    found = []
    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        if name == "CONTRIBUTING.md" and line.startswith("|"):  # the table that lists them
            continue
        for better, words in INSTEAD.items():
            for hit in re.finditer(rf"(?<![a-zA-Z])(?:{words})(?![a-zA-Z])", line, re.IGNORECASE):
                if ALLOWED.search(line):
                    continue
                if better.startswith("error") and (name.startswith(INJECTED) or INJECTED_LINE.search(line)):
                    continue
                if better.startswith("response") and (name in MATH or MATH_LINE.search(line)):
                    continue
                found.append(f"{name}:{number}: {hit.group()!r}, say {better}: {line.strip()[:100]}")
    return found


def test_stand_ins_are_found() -> None:
    """Or the test below could not fail."""
    pattern = re.compile(rf"(?<![a-zA-Z])(?:{INSTEAD['heartbeat']})(?![a-zA-Z])")
    assert pattern.search("self._beats")
    assert not pattern.search("heartbeats")
    assert len(files()) > 200


@pytest.mark.parametrize("place", sorted({"/".join(name.split("/")[:2]) for name in files()}))
def test_words(place: str) -> None:
    found = [line for name in files() if name == place or name.startswith(place + "/") for line in stand_ins(name)]
    assert not found, "\n".join(found)
