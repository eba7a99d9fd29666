"""The responses that a run without training leaves: a row for each sample, which other programs read, and which a run
of mode "sft" can train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from miles_spmd.telemetry.json_lines import LineWriter, cut, last_step
from miles_spmd.types.sample import Sample

RESPONSES_FILE = "responses.jsonl"


class ResponseRow(msgspec.Struct, frozen=True):
    """``log_probs`` and ``loss_mask`` are about ``tokens``, those behind ``prompt_tokens``."""

    step: int  # steps that are done with it
    uid: str  # of the prompt: file and row
    index: int  # among the prompt's samples
    trajectory: int  # among those of an environment's episode
    role: str  # of the player whose trajectory it is, "" where there is one player
    prompt: str  # the model's input, with the chat template applied
    response: str
    messages: list[dict[str, Any]]  # the conversation with its last message; empty where the prompt is plain text
    label: Any
    reward: float | None
    reward_detail: dict[str, float]
    finish_reason: str
    prompt_tokens: list[int]
    tokens: list[int]
    log_probs: list[float]  # natural log, 0 for tokens that the model did not sample
    loss_mask: list[int]  # 1 where it did


def steps_written(run_dir: Path, done: int) -> int:
    """Return after how many of the ``done`` steps the file in ``run_dir`` has no gap: all, or where it ends before the
    last of them, those before the one that it ends with, of which rows may be missing. Raises OSError."""
    last = last_step(run_dir / RESPONSES_FILE)
    return done if last >= done else max(last - 1, 0)


def row(step: int, sample: Sample) -> ResponseRow:
    """Return what is kept of a sample of the rollout after which ``step`` steps are done."""
    line = sample.trajectory
    messages = line.messages
    if not messages and (asked := sample.prompt.metadata.get("messages")):
        messages = [*asked, {"role": "assistant", "content": sample.text}]
    return ResponseRow(
        step=step,
        uid=sample.prompt.uid,
        index=sample.index,
        trajectory=line.number,
        role=line.role,
        prompt=sample.prompt.text,
        response=sample.text,
        messages=messages,
        label=sample.prompt.label,
        reward=sample.reward,
        reward_detail=sample.reward_detail,
        finish_reason=str(sample.finish_reason),
        prompt_tokens=line.start,
        tokens=line.response,
        log_probs=line.log_probs,
        loss_mask=line.loss_mask,
    )


class ResponseWriter:
    """Appends the samples of steps to ``responses.jsonl`` in ``run_dir``, behind those of the first ``done`` steps."""

    def __init__(self, run_dir: Path, done: int) -> None:
        path = run_dir / RESPONSES_FILE
        cut(path, done)
        self._lines = LineWriter(path)

    def write(self, step: int, groups: Sequence[Sequence[Sample]]) -> None:
        """Append those of ``step``. Raises OSError."""
        for group in groups:
            for sample in group:
                self._lines.write(row(step + 1, sample))

    def close(self) -> None:
        self._lines.close()
