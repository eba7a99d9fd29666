"""The calls of the environment in one rollout: what they ask the policy for, and the samples that they become."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from miles_spmd.config import EnvironmentConfig
from miles_spmd.controller.generation.sampling import Sampling
from miles_spmd.controller.generation.unfinished import Response, key
from miles_spmd.environments.messages import Ask, Begin, Cancel, Completed, Event, Failed, Finished, Line, Order
from miles_spmd.types.request import Output, Request
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory


class Host(Protocol):
    """Runs the environment."""

    events: deque[Event]  # that have arrived; filled by another thread, where the environment has processes

    def send(self, order: Order) -> None: ...

    def close(self) -> None: ...


class EnvironmentFailedError(RuntimeError):
    """Episodes whose environment failed, by which the run ends. The message gives prompt, sample, cause and remedy."""


class Done(msgspec.Struct, frozen=True):
    """An episode that has ended; ``samples`` is None where its group is to be dropped, and empty where the episode
    alone is left out."""

    group: int
    index: int
    samples: list[Sample] | None


class Episode:
    """One call of the environment, for sample ``index`` of ``group``; its trajectories are held here."""

    def __init__(self, group: int, index: int, prompt: Prompt) -> None:
        self.group, self.index, self.prompt = group, index, prompt
        self.attempts = 0
        self.segments: dict[int, Segment] = {}
        self.last = ""  # the rid of its last request that is complete

    def give(self, given: Mapping[int, list[int]]) -> None:
        """Take the tokens of segments that come from the environment."""
        self.segments |= {number: Segment(tokens, sampled=False) for number, tokens in given.items()}

    def trajectory(self, line: Line) -> Trajectory:
        """Raises KeyError for a segment that nobody has given or sampled."""
        return Trajectory(line.start, [self.segments[number] for number in line.segments], line.number)

    def samples(self, finished: Finished) -> list[Sample]:
        """Return the samples of the trajectories that the environment has returned."""
        self.give(finished.given)
        samples, trained = list[Sample](), set[int]()
        for end in finished.ends:
            trajectory = self.trajectory(end.line)
            for place, number in enumerate(end.line.segments):
                if number in end.untrained or number in trained:  # siblings train once what they have in common
                    trajectory.segments[place] = msgspec.structs.replace(trajectory.segments[place], trained=False)
            trained |= set(end.line.segments)
            trajectory.text, trajectory.messages = end.text, end.messages
            trajectory.finish_reason = end.finish_reason
            samples.append(Sample(self.prompt, self.index, trajectory, end.reward, end.reward_detail))
        samples[0].trajectory.metrics = finished.metrics
        return samples


class Episodes:
    """Those of one rollout, which needs ``count`` groups. ``given`` are responses from before an interruption, by the
    digests of their requests."""

    def __init__(
        self,
        host: Host,
        sampling: Sampling,
        numbers: Iterator[int],
        limits: EnvironmentConfig,
        count: int,
        given: Mapping[str, Response] | None = None,
    ) -> None:
        self.purpose, self.samples = sampling.purpose, sampling.samples
        self.failures: Counter[str] = Counter()  # by kind, those that another attempt has made good included
        self._host, self._sampling, self._numbers, self._given = host, sampling, numbers, given or {}
        self._limits, self._planned = limits, count * sampling.samples
        self._lost: list[str] = []  # what was wrong with episodes that have failed for good
        self._running: dict[int, Episode] = {}
        self._made: dict[str, tuple[Request, Response]] = {}  # by rid, what the policy has sampled
        self._ends: dict[str, Sample] = {}  # samples, by the rid of the last request of their episodes
        self._asked: dict[str, tuple[Request, Ask]] = {}  # by rid, until the output is here
        self._done: list[Done] = []

    @property
    def has_news(self) -> bool:
        """Whether an environment has asked for something, or has ended."""
        return bool(self._host.events)

    def begin(self, group: int, prompts: Sequence[Prompt]) -> None:
        """Call the environment for every sample of the groups of ``prompts``, the first of which is ``group``."""
        for number, prompt in enumerate(prompts, group):
            for index in range(self._sampling.samples):
                self._begin(Episode(number, index, prompt))

    def _begin(self, episode: Episode) -> None:
        number = next(self._numbers)
        self._running[number] = episode
        self._host.send(Begin(number, episode.prompt, episode.index, self._sampling.params.max_new_tokens))

    def requests(self) -> list[Request]:
        """Return what the policy is asked for since the last call, without what there is from before."""
        asked = list[Request]()
        while self._host.events:
            event = self._host.events.popleft()
            if (episode := self._running.get(event.episode)) is None:
                continue  # cancelled
            match event:
                case Ask():
                    asked += self._request(episode, event)
                case Finished():
                    self._finish(event.episode, episode.samples(event))
                case Failed():
                    self._fail(event)
        return asked

    def _request(self, episode: Episode, ask: Ask) -> Iterator[Request]:
        episode.give(ask.given)
        trajectory = episode.trajectory(ask.line)
        request = self._sampling.request(
            episode.prompt,
            episode.index,
            trajectory.tokens,
            turn=trajectory.turns,
            trajectory=ask.line.number,
            max_new_tokens=ask.max_new_tokens,
            stop=ask.stop,
            rid=f"{episode.group}.{ask.episode}.{ask.segment}",
        )
        self._asked[request.rid] = request, ask
        given = self._given.get(key(request)) if self._given else None
        if given is None:
            yield request
        elif not given.complete:
            yield msgspec.structs.replace(request, begun=given.begun)
        else:
            self.complete(msgspec.structs.replace(given.output, rid=request.rid), given)

    def complete(self, output: Output, known: Response | None = None) -> None:
        """Give an output to the episode that asked for it; ``known``: from before an interruption."""
        request, ask = self._asked.pop(output.rid)
        self._made[output.rid] = request, known or Response(output)
        if output.finish_reason is FinishReason.ABORT or (episode := self._running.get(ask.episode)) is None:
            return
        segment = Segment(
            output.output_ids, True, True, output.output_log_probs, output.weight_versions, output.top1_ids
        )
        episode.segments[ask.segment], episode.last = segment, output.rid
        self._host.send(Completed(ask.episode, ask.segment, output.output_ids, output.finish_reason))

    def take_finished(self) -> list[Done]:
        """Return the episodes that have ended since the last call."""
        done, self._done = self._done, []
        return done

    def _finish(self, number: int, samples: list[Sample]) -> None:
        episode = self._running.pop(number)
        _, known = self._made[episode.last]
        if known.reward is not None:
            samples[0].reward, samples[0].reward_detail = known.reward, known.reward_detail
        self._ends[episode.last] = samples[0]
        self._done.append(Done(episode.group, episode.index, samples))

    def _fail(self, failed: Failed) -> None:
        """Begin the episode anew, with the same seeds, or do without it. Raises EnvironmentFailedError."""
        episode, limits = self._running.pop(failed.episode), self._limits
        self.failures[failed.kind] += 1
        if not failed.own or episode.attempts < limits.environment_retries:
            again = Episode(episode.group, episode.index, episode.prompt)
            again.attempts = episode.attempts + failed.own
            self._begin(again)
            return
        self._lost.append(failed.problem)
        where = f"environment {limits.environment!r} on prompt {episode.prompt.uid}, sample {episode.index},"
        trace = f"\n{failed.trace}" if failed.trace else ""
        if limits.on_environment_failure == "stop":
            raise EnvironmentFailedError(f"{where} {failed.problem}; fix it, or set on_environment_failure{trace}")
        if len(self._lost) > limits.max_environment_failures * self._planned:
            (common, times), *_ = Counter(self._lost).most_common(1)
            raise EnvironmentFailedError(
                f"{len(self._lost)} episodes of a rollout of {self._planned} have failed, more than "
                f"environment.max_environment_failures = {limits.max_environment_failures:g} of them; {times} times: "
                f"{common}; last: {where} {failed.problem}{trace}"
            )
        masks = limits.on_environment_failure == "mask" or self.purpose
        self._done.append(Done(episode.group, episode.index, [] if masks else None))
        if not masks:
            self._cancel([n for n, other in self._running.items() if other.group == episode.group])

    def responses(self, version: int) -> dict[str, Response]:
        """Return what weights ``version`` alone have sampled, complete or not, by the digests of the requests; with the
        rewards that there are."""
        found: dict[str, Response] = {}
        for rid, (request, response) in self._made.items():
            if [one for one, _ in response.output.weight_versions] == [version]:
                sample = self._ends.get(rid)
                rewarded = {} if sample is None else {"reward": sample.reward, "reward_detail": sample.reward_detail}
                found[key(request)] = msgspec.structs.replace(response, **rewarded)
        return found

    def cancel(self) -> None:
        """End what still runs."""
        self._cancel(list(self._running))

    def _cancel(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._host.send(Cancel(number))
            del self._running[number]
