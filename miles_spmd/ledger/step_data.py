"""The data that a step's digests were computed from: one compressed file per step, for the newest steps.

A file ends with a digest of all that is before it. So a changed bit is found in bytes, too, that decompress to the same
data.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from miles_spmd.ledger.entries import FOLDER, Digests, LedgerError, Samples, digest, digests
from miles_spmd.types.files import write_whole
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.seeds import sample_seed
from miles_spmd.types.train_sequence import TrainSequence
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory

ADVANTAGES = "advantages"
FIELDS = [name for name in TrainSequence.__struct_fields__ if name != "candidates"]  # only requested, not trained on
LEVEL = 1  # of compression; higher ones are slower and gain little on log-probs
DIGEST_BYTES = 16  # at the end of a file


class Ragged(msgspec.Struct):
    """Arrays of one dtype and of different lengths, concatenated."""

    flat: np.ndarray
    lengths: np.ndarray  # int32

    @classmethod
    def of(cls, arrays: Iterable[ArrayLike], dtype: type | None = None) -> Ragged:
        given = [np.asarray(array, dtype) for array in arrays]
        flat = np.concatenate(given) if given else np.zeros(0, dtype)
        return cls(flat, np.asarray([len(array) for array in given], np.int32))

    def split(self) -> list[np.ndarray]:
        return np.split(self.flat, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


Origin = tuple[int, bool, bool]  # of a segment: number of tokens, sampled by the policy, trained


class SampleData(msgspec.Struct, rename={"responses": "answers"}, omit_defaults=True):  # the name on disk
    """The samples of a rollout, in order of submission."""

    dropped: int  # groups that the filter did not keep
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
    segments: list[list[Origin]] = []  # of each sample
    turn_rewards: list[list[float | None]] = []  # of each sample; empty where no turn has one
    roles: list[str] = []  # of each sample; empty where none has one

    @classmethod
    def of(cls, samples: Sequence[Sample], dropped: int) -> SampleData:
        turn_rewards = [sample.trajectory.turn_rewards for sample in samples]
        roles = [sample.role for sample in samples]
        return cls(
            dropped=dropped,
            uids=[s.prompt.uid for s in samples],
            indices=[s.index for s in samples],
            prompts=Ragged.of((s.trajectory.start for s in samples), np.int32),
            responses=Ragged.of((s.response for s in samples), np.int32),
            masks=Ragged.of((s.loss_mask for s in samples), np.int8),
            log_probs=Ragged.of((s.rollout_log_probs for s in samples), np.float32),
            finish_reasons=[str(s.finish_reason) for s in samples],
            weight_versions=[s.weight_versions for s in samples],
            rewards=[None if s.reward is None else float(s.reward) for s in samples],
            reward_details=[{name: float(v) for name, v in s.reward_detail.items()} for s in samples],
            segments=[[(len(one.tokens), one.sampled, one.trained) for one in s.trajectory.segments] for s in samples],
            turn_rewards=turn_rewards if any(turn_rewards) else [],
            roles=roles if any(roles) else [],
        )

    def digests(self, run_seed: int, step: int) -> Samples:
        seeds = [sample_seed(run_seed, step, uid, index) for uid, index in zip(self.uids, self.indices)]
        versions, details = map(str, self.weight_versions), map(str, self.reward_details)
        turn_rewards = [map(str, self.turn_rewards)] if self.turn_rewards else []
        roles = [self.roles] if self.roles else []
        return Samples(
            dropped=self.dropped,
            requests=digests(map(digest, self.uids, self.indices, seeds, self.prompts.split(), *roles)),
            responses=digests(map(digest, self.responses.split(), self.masks.split(), self.finish_reasons, versions)),
            log_probs=digests(map(digest, self.log_probs.split())),
            rewards=digests(map(digest, self.rewards, details, *turn_rewards)),
        )

    def samples(self, prompts: Mapping[str, Prompt]) -> list[Sample]:
        """Return the samples as engine and reward function returned them; ``prompts`` by uid."""
        starts, responses, log_probs = (ragged.split() for ragged in (self.prompts, self.responses, self.log_probs))
        origins = self.segments or [[(len(response), True, True)] for response in responses]
        samples = []
        for i, uid in enumerate(self.uids):
            trajectory = Trajectory(
                starts[i].tolist(),
                _segments(origins[i], responses[i].tolist(), log_probs[i].tolist(), self.weight_versions[i]),
                role=self.roles[i] if self.roles else "",
                finish_reason=FinishReason(self.finish_reasons[i]),
            )
            for turn, reward in enumerate(self.turn_rewards[i] if self.turn_rewards else []):
                if reward is not None:
                    trajectory.reward_turn(reward, turn)
            samples.append(
                Sample(prompts[uid], self.indices[i], trajectory, self.rewards[i], dict(self.reward_details[i]))
            )
        return samples


def _segments(
    origins: Sequence[Origin], tokens: list[int], log_probs: list[float], versions: Sequence[tuple[int, int]]
) -> list[Segment]:
    """Cut the tokens behind a trajectory's start, and their log-probs and versions, into its segments."""
    segments, start = list[Segment](), 0
    of_sampled = [version for version, count in versions for _ in range(count)]
    for count, sampled, trained in origins:
        own, of_sampled = (of_sampled[:count], of_sampled[count:]) if sampled else ([], of_sampled)
        segments.append(
            Segment(
                tokens[start : start + count],
                sampled,
                trained,
                log_probs[start : start + count] if sampled else [],
                [(version, len(list(same))) for version, same in groupby(own)],
            )
        )
        start += count
    return segments


class UpdateData(msgspec.Struct):
    """The sequences of one optimizer step, and the log-probs of its forward pass."""

    fields: dict[str, Ragged]  # by the names of TrainSequence
    log_probs: Ragged  # float32

    @classmethod
    def of(cls, batch: Sequence[TrainSequence], log_probs: Sequence[np.ndarray]) -> UpdateData:
        given = {name: [getattr(s, name) for s in batch] for name in FIELDS}
        present = {name: arrays for name, arrays in given.items() if all(a is not None for a in arrays)}
        return cls({name: Ragged.of(arrays) for name, arrays in present.items()}, Ragged.of(log_probs))

    def digests(self) -> dict[str, Digests]:
        """Return digests by the names that they have in Update."""
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
    return (value.dtype.str, value.tobytes())  # of arrays, the only type that msgspec does not encode by itself


def _decode(kind: type, value: Any) -> np.ndarray:
    return np.frombuffer(value[1], np.dtype(value[0]))


_decoder = msgspec.msgpack.Decoder(StepData, dec_hook=_decode)


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / "data" / f"step_{step:06d}.msgpack.z"


def read(run_dir: Path, step: int) -> StepData | None:
    """Read the data of a step; None if the file does not exist. Raises LedgerError where it was changed."""
    path = path_of(run_dir, step)
    try:
        file = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}") from None
    content, digest = file[:-DIGEST_BYTES], file[-DIGEST_BYTES:]
    if _digest(content) != digest:
        raise LedgerError(f"{path}: was changed or cut off: its digest does not follow from it")
    try:
        return _decoder.decode(zlib.decompress(content))
    except msgspec.DecodeError as error:
        raise LedgerError(f"{path}: was written by another version: {error}") from None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class DataStore:
    """Writes step data in a thread, and deletes the oldest files beyond ``room`` bytes."""

    def __init__(self, run_dir: Path, first_step: int, room: int, seal: Callable[[Iterable[int]], None]) -> None:
        """Delete the files of ``first_step`` and later ones: a resumed run repeats these steps.

        ``seal`` is told which steps' data are on disk: before files are deleted, and after one was written."""
        self._run_dir, self._room, self._seal = run_dir, room, seal
        folder = path_of(run_dir, first_step).parent
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob("*.tmp"):
            unfinished.unlink()
        found = {int(path.name.split(".")[0].removeprefix("step_")): path for path in sorted(folder.glob("step_*.z"))}
        self._sizes = {step: path.stat().st_size for step, path in found.items() if step < first_step}
        seal(self._sizes)
        for step in found.keys() - self._sizes.keys():
            found[step].unlink()
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] = self._thread.submit(lambda: None)

    def write(self, step: int, data: StepData) -> None:
        """Start writing. Raises the exception of the previous write, if it failed."""
        if self._room:
            self.wait()
            self._last = self._thread.submit(self._write, step, data)

    def wait(self) -> None:
        """Return when everything is written. Raises the exception of the last write, if it failed."""
        self._last.result()

    def close(self) -> None:
        """Do as :meth:`wait`, and end the thread."""
        self._thread.shutdown()
        self.wait()

    def _write(self, step: int, data: StepData) -> None:
        content = zlib.compress(msgspec.msgpack.encode(data, enc_hook=_encode), LEVEL)
        write_whole(path_of(self._run_dir, step), content + _digest(content))
        self._sizes[step] = len(content) + DIGEST_BYTES
        oldest = []
        while sum(self._sizes.values()) > self._room:
            oldest.append(next(iter(self._sizes)))
            del self._sizes[oldest[-1]]
        self._seal(self._sizes)
        for old in oldest:
            path_of(self._run_dir, old).unlink()
