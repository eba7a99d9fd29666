"""What the digests of a step are of, for as many of the newest steps as there is room: one compressed file a step."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from miles_spmd.ledger.chain import FOLDER
from miles_spmd.ledger.entries import Digests, Samples, digest, digests
from miles_spmd.types.sample import FinishReason, Prompt, Sample
from miles_spmd.types.seeds import sample_seed
from miles_spmd.types.train_sequence import TrainSequence

ADVANTAGES = "advantages"
FIELDS = [name for name in TrainSequence.__struct_fields__ if name != "candidates"]  # asked for and forgotten
LEVEL = 1  # of compression; more takes longer and gains little on log-probs


class Ragged(msgspec.Struct):
    """Arrays of one dtype and of many lengths, end to end."""

    flat: np.ndarray
    lengths: np.ndarray  # int32

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Ragged:
        return cls(np.concatenate(arrays), np.asarray([len(array) for array in arrays], np.int32))

    def split(self) -> list[np.ndarray]:
        return np.split(self.flat, np.cumsum(self.lengths)[:-1])


class SampleData(msgspec.Struct, rename={"responses": "answers"}):  # as files on disk have it
    """A rollout, in order of submission."""

    dropped: int  # groups that a filter did not keep
    uids: list[str]
    indices: list[int]
    prompts: Ragged  # int32
    responses: Ragged  # int32
    masks: Ragged  # int8
    log_probs: Ragged  # float32
    finish_reasons: list[str]
    weight_versions: list[list[tuple[int, int]]]
    rewards: list[float | None]
    reward_details: list[dict[str, float]]

    @classmethod
    def of(cls, samples: Sequence[Sample], dropped: int) -> SampleData:
        def ragged(lists: Iterable[Sequence[float]], dtype: type) -> Ragged:
            return Ragged.of([np.asarray(values, dtype) for values in lists])

        return cls(
            dropped=dropped,
            uids=[s.prompt.uid for s in samples],
            indices=[s.index for s in samples],
            prompts=ragged((s.prompt.tokens for s in samples), np.int32),
            responses=ragged((s.response for s in samples), np.int32),
            masks=ragged((s.loss_mask for s in samples), np.int8),
            log_probs=ragged((s.rollout_log_probs for s in samples), np.float32),
            finish_reasons=[str(s.finish_reason) for s in samples],
            weight_versions=[s.weight_versions for s in samples],
            rewards=[None if s.reward is None else float(s.reward) for s in samples],
            reward_details=[{name: float(v) for name, v in s.reward_detail.items()} for s in samples],
        )

    def digests(self, run_seed: int, step: int) -> Samples:
        seeds = [sample_seed(run_seed, step, uid, index) for uid, index in zip(self.uids, self.indices)]
        versions, details = map(str, self.weight_versions), map(str, self.reward_details)
        return Samples(
            dropped=self.dropped,
            requests=digests(map(digest, self.uids, self.indices, seeds, self.prompts.split())),
            responses=digests(map(digest, self.responses.split(), self.masks.split(), self.finish_reasons, versions)),
            log_probs=digests(map(digest, self.log_probs.split())),
            rewards=digests(map(digest, self.rewards, details)),
        )

    def samples(self, prompts: Mapping[str, Prompt]) -> list[Sample]:
        """As they came from the engine and the reward function; ``prompts`` by uid."""
        lists = (r.split() for r in (self.responses, self.masks, self.log_probs))
        return [
            Sample(
                prompt=prompts[uid],
                index=index,
                response=answer.tolist(),
                loss_mask=mask.tolist(),
                rollout_log_probs=log_probs.tolist(),
                finish_reason=FinishReason(reason),
                weight_versions=versions,
                reward=reward,
                reward_detail=detail,
            )
            for uid, index, answer, mask, log_probs, reason, versions, reward, detail in zip(
                self.uids,
                self.indices,
                *lists,
                self.finish_reasons,
                self.weight_versions,
                self.rewards,
                self.reward_details,
                strict=True,
            )
        ]


class UpdateData(msgspec.Struct):
    """One optimizer step: what there was of each sequence, and what the model made of it."""

    fields: dict[str, Ragged]  # by the names of TrainSequence
    log_probs: Ragged  # float32

    @classmethod
    def of(cls, batch: Sequence[TrainSequence], log_probs: Sequence[np.ndarray]) -> UpdateData:
        given = {name: [getattr(s, name) for s in batch] for name in FIELDS}
        present = {name: arrays for name, arrays in given.items() if all(a is not None for a in arrays)}
        return cls({name: Ragged.of(arrays) for name, arrays in present.items()}, Ragged.of(log_probs))

    def digests(self) -> dict[str, Digests]:
        """By the names of Update."""
        inputs = [ragged.split() for name, ragged in self.fields.items() if name != ADVANTAGES]
        advantages = self.fields.get(ADVANTAGES)
        return {
            "inputs": digests(map(digest, *inputs)),
            "advantages": digests(map(digest, advantages.split() if advantages else ())),
            "log_probs": digests(map(digest, self.log_probs.split())),
        }


class StepData(msgspec.Struct):
    samples: SampleData | None
    updates: list[UpdateData]


def _encode(value: Any) -> Any:
    return (value.dtype.str, value.tobytes())  # of arrays, which is all that msgspec does not know


def _decode(kind: type, value: Any) -> np.ndarray:
    return np.frombuffer(value[1], np.dtype(value[0]))


_decoder = msgspec.msgpack.Decoder(StepData, dec_hook=_decode)


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / "data" / f"step_{step:06d}.msgpack.z"


def read(run_dir: Path, step: int) -> StepData | None:
    """None where it was not kept, or was only half written."""
    try:
        return _decoder.decode(zlib.decompress(path_of(run_dir, step).read_bytes()))
    except (OSError, zlib.error, msgspec.DecodeError):
        return None


class DataStore:
    """Writes in a thread of its own; at most ``room`` bytes stay, of the newest steps."""

    def __init__(self, run_dir: Path, first_step: int, room: int) -> None:
        """What there is of ``first_step`` and after belongs to steps that will be done again."""
        self._run_dir, self._room = run_dir, room
        folder = path_of(run_dir, 0).parent
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[Path, int] = {}
        for path in sorted(folder.glob("step_*")):
            if path.name < path_of(run_dir, first_step).name:
                self._files[path] = path.stat().st_size
            else:
                path.unlink()
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def write(self, step: int, data: StepData) -> None:
        """Raises what writing the step before has raised."""
        if self._room:
            self._wait()
            self._last = self._thread.submit(self._write, path_of(self._run_dir, step), data)

    def close(self) -> None:
        self._thread.shutdown()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def _write(self, path: Path, data: StepData) -> None:
        content = zlib.compress(msgspec.msgpack.encode(data, enc_hook=_encode), LEVEL)
        scratch = path.with_suffix(".tmp")
        scratch.write_bytes(content)
        scratch.replace(path)
        self._files[path] = len(content)
        while sum(self._files.values()) > self._room:
            oldest = next(iter(self._files))
            oldest.unlink()
            del self._files[oldest]
