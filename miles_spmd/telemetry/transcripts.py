"""Transcripts: evaluated samples for people to read, each with its prompt, response and reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from miles_spmd.config import Config
from miles_spmd.telemetry.trackers import read_lines
from miles_spmd.types.sample import Sample

TRANSCRIPTS_FILE = "transcripts.jsonl"


class Transcript(msgspec.Struct, frozen=True):
    step: int
    source: str  # name of the evaluation set
    uid: str
    prompt: str
    response: str
    label: str
    reward: float | None
    finish_reason: str
    tokens: int  # of the response


def write_transcripts(config: Config, step: int, sets: Mapping[str, Sequence[Sequence[Sample]]]) -> None:
    """Append the first response to each of the first ``num_transcripts`` prompts of every set to ``transcripts.jsonl``.

    These are the same prompts in every evaluation.
    """
    transcripts = [
        Transcript(
            step=step,
            source=name,
            uid=sample.prompt.uid,
            prompt=sample.prompt.text,
            response=sample.text,
            label="" if sample.prompt.label is None else str(sample.prompt.label),
            reward=sample.reward,
            finish_reason=str(sample.finish_reason),
            tokens=len(sample.response),
        )
        for name, groups in sets.items()
        for sample, *_ in groups[: config.telemetry.num_transcripts]
    ]
    with (config.run_dir / TRANSCRIPTS_FILE).open("ab") as file:
        file.write(b"".join(msgspec.json.encode(transcript) + b"\n" for transcript in transcripts))


def read_transcripts(run_dir: Path) -> list[Transcript]:
    """Return the transcripts in the order written, without incomplete lines; an empty list without a file."""
    path = run_dir / TRANSCRIPTS_FILE
    return list(read_lines(path, Transcript)) if path.is_file() else []
