"""The reward ``judge`` by engines of this run: a group of their own that holds any checkpoint and is never trained.

A question is a request whose seed is a function of the sample, and a reply is a function of request and weights. So are
the scores, then: they do not depend on time, and a run with such a judge can be repeated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from miles_spmd.config import Config
from miles_spmd.config.judge import JudgeArguments
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.rollout_session import RolloutSession
from miles_spmd.data.template import TemplateError, fixed_clock
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.models import load_family
from miles_spmd.plugins.reward import Score
from miles_spmd.rewards.adapters import BadReward
from miles_spmd.rewards.functions import to_score
from miles_spmd.rewards.judge import filled, verdict
from miles_spmd.rewards.pool import explained
from miles_spmd.types.engine_group import JUDGE
from miles_spmd.types.request import Output, Request, SamplingParams
from miles_spmd.types.sample import Sample
from miles_spmd.types.seeds import derive_seed


@dataclass
class _Call:
    """Samples that are scored together, and their scores as far as they are there."""

    samples: Sequence[Sample]
    scores: list[Score | None]
    future: Future[list[Score | None]]


@dataclass
class _Question:
    """One sample of a call, which the judge is asked about the ``attempt``-th time."""

    call: _Call
    place: int
    request: Request
    attempt: int = 0

    @property
    def sample(self) -> Sample:
        return self.call.samples[self.place]


class EngineJudge:
    """Scores samples in the main thread, while a rollout is open: see :meth:`opened` and :meth:`take`."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        """Raises TokenizerError."""
        group = config.engine_group(JUDGE)
        self._reward, self._run_seed, self._cluster = config.reward, config.run.seed, cluster
        self._arguments = JudgeArguments.model_validate(config.reward.judge_arguments)
        self._template_variables = {
            "strftime_now": fixed_clock(config.data.chat_template_date),
            **self._arguments.chat_template_kwargs,
        }
        self._tokenizer = Tokenizer(group.hf_checkpoint)
        longest = load_family(group.hf_checkpoint).max_sequence_length
        self._context = int(group.server_args.get("context_length") or longest)
        self._numbers = itertools.count()  # of calls: the questions of one go to one engine
        self._asked: dict[str, _Question] = {}  # by rid, until the judge's last reply is here
        self._unsent: list[Request] = []
        self._session: RolloutSession | None = None

    @contextmanager
    def opened(self, step: int, purpose: str) -> Iterator[None]:
        """Judge in the block; what has no score at its end fails with a CancelledError."""
        purpose = ", ".join(filter(None, ["judge", purpose]))
        try:
            with self._cluster.rollout(step, purpose=purpose, group=JUDGE) as self._session:
                yield
        finally:
            self._session = None
            calls = [question.call for question in self._asked.values()]
            self._asked, self._unsent = {}, []
            for call in calls:
                _fail(call, CancelledError())

    def submit(self, samples: list[Sample]) -> Future[list[Score | None]]:
        """Start scoring, with the next :meth:`take`. The future gives one score per sample, in order, or raises
        RewardError."""
        call, number = _Call(samples, [None] * len(samples), Future()), next(self._numbers)
        try:
            requests = [self._request(sample, f"{number}.{place}.0") for place, sample in enumerate(samples)]
        except BadReward as error:
            _fail(call, explained("judge", samples[0], error))
            return call.future
        self._asked |= {request.rid: _Question(call, place, request) for place, request in enumerate(requests)}
        self._unsent += requests
        return call.future

    @property
    def has_news(self) -> bool:
        """Whether :meth:`take` has something to do."""
        return self._session is not None and (bool(self._unsent) or self._session.has_news)

    def take(self) -> None:
        """Send the questions since the last call, and score by the replies that are there; without waiting. Raises a
        WorkerError."""
        assert self._session is not None
        for output in self._session.take():
            self._receive(output)
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            self._session.submit(unsent)

    def describe(self) -> str:
        """Return in words what is waited for."""
        return f"{len(self._asked)} replies of the judge are not there"

    def _receive(self, output: Output) -> None:
        question = self._asked.pop(output.rid)
        call, sample = question.call, question.sample
        reply = self._tokenizer.decode(output.output_ids)
        try:
            found = verdict(self._reward, reply, question.attempt)
            if found is None:
                self._ask_again(question)
                return
            call.scores[question.place] = to_score(found, sample)
        except BadReward as error:
            problem = BadReward(error.problem, sample.index, error.trace)
            _fail(call, explained("judge", sample, problem))
        if None not in call.scores and not call.future.done():
            call.future.set_result(call.scores)

    def _ask_again(self, question: _Question) -> None:
        attempt = question.attempt + 1
        rid = f"{question.request.rid.rpartition('.')[0]}.{attempt}"
        sampling = msgspec.structs.replace(question.request.sampling, seed=self._seed(question.sample, attempt))
        request = msgspec.structs.replace(question.request, rid=rid, sampling=sampling)
        self._asked[rid] = _Question(question.call, question.place, request, attempt)
        self._unsent.append(request)

    # --- a question --------------------------------------------------------------------------------------------------

    def _request(self, sample: Sample, rid: str) -> Request:
        """Raises BadReward for a question that the judge cannot be asked."""
        arguments, tokens = self._arguments, self._tokens(sample)
        if len(tokens) + arguments.max_tokens > self._context:
            raise BadReward(
                f"is a question of {len(tokens)} tokens to the judge, whose context of {self._context} has no room for "
                f"max_tokens = {arguments.max_tokens} more; lower it in reward.judge_arguments, shorten "
                "reward.judge_prompt, or take a judge with a longer context",
                sample.index,
            )
        sampling = SamplingParams(
            max_new_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            stop=arguments.stop_texts,
            seed=self._seed(sample, 0),
        )
        return Request(rid, tokens, sampling)

    def _tokens(self, sample: Sample) -> list[int]:
        """Return the judge's prompt: the question as the message of a user, by the judge's own chat template. What
        spells a special token in it is text: a response must not be able to end the message and go on as the judge.
        """
        question = filled(self._reward.judge_prompt or "", sample)
        messages = [{"role": "user", "content": question}]
        try:
            text = self._tokenizer.render(messages, arguments=self._template_variables)
        except TemplateError as error:
            raise BadReward(f"cannot be put to the judge: {error}", sample.index) from error
        own = question.strip()  # of which a template may take the white space
        start = text.find(own)
        literal = [] if start < 0 else [(start, start + len(own))]
        return self._tokenizer.encode_continuation(text, literal, at_start=True)

    def _seed(self, sample: Sample, attempt: int) -> int:
        return derive_seed("judge", self._run_seed, sample.prompt.uid, sample.index, attempt, sample.text)


def _fail(call: _Call, error: BaseException) -> None:
    """Of a call's errors the first counts."""
    if not call.future.done():
        call.future.set_exception(error)
