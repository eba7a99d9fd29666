"""How the trajectories of a rollout are sampled, and the request of each of their turns."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from miles_spmd.config import Config, EvalSet, RewardTerm
from miles_spmd.types.request import Request, SamplingParams
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.seeds import sample_seed

EVAL_SEED_STEP = 0  # evaluations differ in the weights only: the seeds of each are those of step 0


class Sampling(msgspec.Struct, frozen=True):
    """What the requests of one rollout have in common."""

    run_seed: int
    step: int  # from which the seeds are derived
    samples: int  # of each prompt
    params: SamplingParams  # max_new_tokens: of a whole trajectory, behind its start
    return_top1: bool = False
    purpose: str = ""  # other than training
    terms: Sequence[RewardTerm] = ()  # other reward functions than those of [reward]

    @classmethod
    def of_step(cls, config: Config, step: int) -> Sampling:
        """That of the rollout which ``step`` trains on."""
        r = config.rollout
        params = SamplingParams(
            max_new_tokens=r.rollout_max_response_len,
            temperature=r.rollout_temperature,
            top_p=r.rollout_top_p,
            top_k=r.rollout_top_k,
            stop=r.rollout_stop,
            stop_token_ids=r.rollout_stop_token_ids,
        )
        return cls(config.run.seed, step, r.n_samples_per_prompt, params, config.determinism.counts_flips)

    @classmethod
    def of_set(cls, config: Config, held_out: EvalSet) -> Sampling:
        """That of the evaluation of a held-out set."""
        training = cls.of_step(config, EVAL_SEED_STEP)
        params = msgspec.structs.replace(
            training.params,
            max_new_tokens=held_out.eval_max_response_len,
            temperature=held_out.eval_temperature,
            top_p=held_out.eval_top_p,
            top_k=-1,
        )
        return msgspec.structs.replace(
            training,
            samples=held_out.n_samples_per_eval_prompt or 1,
            params=params,
            purpose=f"evaluation of {held_out.name}",
            terms=held_out.terms,
        )

    def request(
        self,
        prompt: Prompt,
        index: int,
        tokens: list[int],
        *,
        turn: int = 0,
        trajectory: int = 0,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        path: str = "",
        rid: str = "",
    ) -> Request:
        """Return the request that continues ``tokens``, in the given turn of a trajectory of sample ``index``."""
        params = msgspec.structs.replace(
            self.params,
            max_new_tokens=self.params.max_new_tokens if max_new_tokens is None else max_new_tokens,
            stop=[*self.params.stop, *stop],
            seed=sample_seed(self.run_seed, self.step, prompt.uid, index, turn, trajectory, path),
        )
        return Request(rid, tokens, params, return_top1=self.return_top1)

    def request_of(self, sample: Sample, turn: int) -> Request:
        """Return the request that a turn of ``sample`` came from, but for a limit or stop strings of its own."""
        line, before, path = sample.trajectory, -1, ""
        tokens, room = [*line.start], self.params.max_new_tokens
        for segment in line.segments:
            before += segment.sampled
            if segment.sampled and before == turn:
                path = segment.path
                break
            tokens += segment.tokens
            room -= len(segment.tokens)
        return self.request(
            sample.prompt, sample.index, tokens, turn=turn, trajectory=line.number, max_new_tokens=room, path=path
        )
