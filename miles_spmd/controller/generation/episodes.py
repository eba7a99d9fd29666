"""The calls of the environment in one rollout: what they ask the policy for, and the samples that they become."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from miles_spmd.config import EnvironmentConfig
from miles_spmd.controller.generation.durable import DurableRollout
from miles_spmd.controller.generation.leaves import chosen
from miles_spmd.controller.generation.sampling import Sampling
from miles_spmd.controller.generation.unfinished import Response, Reward, key
from miles_spmd.environments.messages import Ask, Begin, Cancel, Completed, End, Event, Failed, Finished, Line, Order
from miles_spmd.plugins.environment import Leaf
from miles_spmd.types.request import Output, Request
from miles_spmd.types.sample import Prompt, Sample, rollouts
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory, train_once

_LATELY = 1024  # episodes whose lengths say how long others will be


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

    def __init__(self, group: int, index: int, prompt: Prompt, sampling: Sampling) -> None:
        self.group, self.index, self.prompt, self.sampling = group, index, prompt, sampling
        self.attempts = 0
        self.segments: dict[int, Segment] = {}
        self.made: list[tuple[Request, Response]] = []  # what the policy has sampled, in order
        self.known: dict[str, Response] = {}  # what it has sampled for an earlier attempt, by the requests' digests
        self.samples: list[Sample] = []  # once it has ended
        self.tokens = 0  # of all its trajectories; what they have in common counts once
        self.shared: int | None = None  # of these, what the engine had from other episodes when it was asked first
        self._starts: set[tuple[int, ...]] = set()

    def again(self, *, failed: bool) -> Episode:
        """Return another attempt, after this one has ``failed`` or was interrupted."""
        episode = Episode(self.group, self.index, self.prompt, self.sampling)
        episode.attempts = self.attempts + failed
        episode.known = self.known | {key(request): one for request, one in self.made if one.complete}
        return episode

    def give(self, given: Mapping[int, list[int]]) -> None:
        """Take the tokens of segments that come from the environment."""
        for number, tokens in given.items():
            self.grow(number, Segment(tokens, sampled=False))

    def grow(self, number: int, segment: Segment) -> None:
        self.segments[number] = segment
        self.tokens += len(segment.tokens)

    def begin(self, start: Sequence[int]) -> None:
        """Take what a trajectory begins with."""
        if (tokens := tuple(start)) not in self._starts:
            self._starts.add(tokens)
            self.tokens += len(tokens)

    @property
    def own_tokens(self) -> int:
        """Number of tokens that no other episode has in the engine's cache, 0 before the first response."""
        return 0 if self.shared is None else self.tokens - self.shared

    def trajectory(self, line: Line) -> Trajectory:
        """Raises KeyError for a segment that nobody has given or sampled."""
        segments = [self.segments[number] for number in line.segments]
        return Trajectory(line.start, segments, line.number, line.role)

    def finish(self, finished: Finished, trains: str) -> None:
        """Make the samples of the trajectories that the environment has returned. Where it has given rewards to turns
        only, a role's is their sum, to which a turn that siblings have in common adds once. ``trains``: which of the
        siblings the loss counts. Raises PlugInError."""
        self.give(finished.given)
        of_turns: dict[str, dict[int, float]] = {}  # by role
        for end in finished.ends:
            rewarded = finished.turn_rewards.keys() & end.line.segments
            of_turns.setdefault(end.line.role, {}).update({n: finished.turn_rewards[n] for n in rewarded})
        for number, of_turn in finished.turn_rewards.items():
            self.segments[number] = msgspec.structs.replace(self.segments[number], reward=of_turn)
        trajectories = [self._ended(end) for end in finished.ends]
        left_out = self._left_out(finished.ends, trajectories, trains)
        train_once([one for number, one in enumerate(trajectories) if number not in left_out])
        for place, (end, trajectory) in enumerate(zip(finished.ends, trajectories)):
            own = of_turns[end.line.role]
            reward = math.fsum(own.values()) if end.reward is None and own else end.reward
            self.samples.append(Sample(self.prompt, self.index, trajectory, reward, end.reward_detail))
            without = end.line.segments if place in left_out else end.untrained
            trajectory.segments = [
                msgspec.structs.replace(segment, trained=False) if number in without else segment
                for number, segment in zip(end.line.segments, trajectory.segments)
            ]
        self.samples[0].trajectory.metrics = finished.metrics
        _, last = self.made[-1]
        for first in rollouts(self.samples):
            if first.role in last.rewards:  # from before an interruption
                last.rewards[first.role].give(first)

    def _ended(self, end: End) -> Trajectory:
        trajectory = self.trajectory(end.line)
        trajectory.text, trajectory.messages = end.text, end.messages
        trajectory.finish_reason, trajectory.reward = end.finish_reason, end.reward
        return trajectory

    def _left_out(self, ends: Sequence[End], trajectories: Sequence[Trajectory], trains: str) -> set[int]:
        """Return the numbers of those that are not trained."""
        of_role: dict[str, list[int]] = {}
        for number, end in enumerate(ends):
            of_role.setdefault(end.line.role, []).append(number)
        left_out = set[int]()
        for numbers in of_role.values():
            leaves = [Leaf(trajectories[n], self._last_asked(ends[n].line)) for n in numbers]
            kept = chosen(trains, leaves)
            left_out |= {n for place, n in enumerate(numbers) if place not in kept}
        return left_out

    def _last_asked(self, line: Line) -> int:
        """Return the number of the last sampled segment, which are numbered as they are asked for; -1 without one."""
        return next((number for number in reversed(line.segments) if self.segments[number].sampled), -1)

    def responses(self) -> Iterator[tuple[Request, Response]]:
        """Yield what the policy has sampled, the last with the rewards that there are."""
        *others, (request, last) = self.made
        yield from others
        rewards = {first.role: reward for first in rollouts(self.samples) if (reward := Reward.of(first)) is not None}
        yield request, msgspec.structs.replace(last, rewards=rewards or last.rewards)


class Episodes:
    """Those of a rollout after another. What a rollout leaves behind can be continued in the next one.

    ``numbers`` names them; ``others`` are those of the same ``host`` that wait while these run.
    """

    def __init__(
        self, host: Host, numbers: Iterator[int], limits: EnvironmentConfig, others: Episodes | None = None
    ) -> None:
        self._host, self._numbers, self._limits, self._others = host, numbers, limits, others
        # the lengths of evaluations and of training are alike enough
        self.ended_with: deque[int] = deque(maxlen=_LATELY) if others is None else others.ended_with
        self._inbox: deque[Event] = deque()  # events that came while others ran
        self._running: dict[int, Episode] = {}
        self._all: list[Episode] = []  # of this rollout
        self._kept: list[Episode] = []  # those of them that go on in the next one
        self._asked: dict[str, tuple[Request, Ask]] = {}  # by rid, until the output is here
        self._begun: dict[str, Response] = {}  # by rid, what a request continues
        self._paused: list[tuple[Ask, Response]] = []  # what the policy had begun when the last rollout ended
        self._done: list[Done] = []
        self.open()

    def open(
        self,
        given: Mapping[str, Response] | None = None,
        purpose: str = "",
        durable: DurableRollout | None = None,
    ) -> None:
        """Begin a rollout. ``given`` are responses from before an interruption, by the digests of their requests;
        ``purpose``: one other than training; ``durable``: those on disk."""
        self.failures: Counter[str] = Counter()  # by kind, those that another attempt has made good included
        self.prefill = self.cached = 0  # tokens of the requests' prompts, and those that the engine had already
        self._given, self._purpose, self._durable = given or {}, purpose, durable
        self._lost: list[str] = []  # what was wrong with episodes that have failed for good

    def tokens_of(self, number: int) -> int | None:
        """Return :attr:`Episode.own_tokens` of an episode that runs, None for another."""
        episode = self._running.get(number)
        return None if episode is None else episode.own_tokens

    def role_of(self, rid: str) -> str:
        """Return the role whose trajectory a request continues that has no output yet."""
        return self._asked[rid][1].line.role

    @property
    def has_news(self) -> bool:
        """Whether an environment has asked for something, or has ended."""
        return bool(self._host.events or self._inbox or self._paused)

    def begin(self, group: int, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Call the environment for every sample of the groups of ``prompts``, the first of which is ``group``."""
        for number, prompt in enumerate(prompts, group):
            for index in range(sampling.samples):
                self._begin(Episode(number, index, prompt, sampling))

    def _begin(self, episode: Episode) -> None:
        number = next(self._numbers)
        self._running[number] = episode
        self._all.append(episode)
        limit, purpose = episode.sampling.params.max_new_tokens, episode.sampling.purpose
        self._host.send(Begin(number, episode.prompt, episode.index, limit, purpose))

    def requests(self) -> list[Request]:
        """Return what the policy is asked for since the last call, without what there is from before."""
        asked = list[Request]()
        paused, self._paused = self._paused, []
        for ask, response in paused:
            asked += self._request(self._running[ask.episode], ask, response)
        while self._inbox or self._host.events:
            event = self._inbox.popleft() if self._inbox else self._host.events.popleft()
            if (episode := self._running.get(event.episode)) is None:  # cancelled, or another's
                if self._others is not None:
                    self._others._inbox.append(event)
                continue
            try:
                match event:
                    case Ask():
                        asked += self._request(episode, event)
                    case Finished():
                        episode.finish(event, "all" if self._purpose else self._limits.trained_leaves)
                        del self._running[event.episode]
                        if episode.shared is not None:
                            self.ended_with.append(episode.own_tokens)
                        self._done.append(Done(episode.group, episode.index, episode.samples))
                    case Failed():
                        self._fail(event)
            except LookupError as error:
                self._fail(Failed(event.episode, "unusable", f"names a segment that does not exist: {error}"))
        return asked

    def _request(self, episode: Episode, ask: Ask, begun: Response | None = None) -> Iterator[Request]:
        """Yield the request for what an episode asks, of which the policy may have ``begun`` some."""
        episode.give(ask.given)
        episode.begin(ask.line.start)
        trajectory = episode.trajectory(ask.line)
        request = episode.sampling.request(
            episode.prompt,
            episode.index,
            trajectory.tokens,
            turn=trajectory.turns,
            trajectory=ask.line.number,
            max_new_tokens=ask.max_new_tokens,
            stop=ask.stop,
            path=ask.path,
            rid=f"{episode.group}.{ask.episode}.{ask.segment}",
        )
        known = begun
        if known is None and (self._given or episode.known or self._durable):
            name = key(request)
            known = self._given.get(name) or episode.known.get(name)
            if self._durable is not None and (known is None or not known.complete):
                known = self._durable.get(name) or known
        self._asked[request.rid] = request, ask
        if known is None or not known.output.output_ids:
            yield request
        elif known.complete:
            self.complete(msgspec.structs.replace(known.output, rid=request.rid), known)
        else:
            self._begun[request.rid] = known
            yield msgspec.structs.replace(request, begun=known.begun)

    def complete(self, output: Output, known: Response | None = None) -> None:
        """Give an output to the episode that asked for it; ``known``: from before an interruption."""
        request, ask = self._asked.pop(output.rid)
        begun = self._begun.pop(output.rid, None)
        episode = self._running.get(ask.episode)
        if episode is None:
            return
        if begun is not None:
            versions = joined_versions(begun.output.weight_versions, output.weight_versions)
            output = msgspec.structs.replace(output, weight_versions=versions)
        if known is None and output.output_ids:
            self.prefill, self.cached = self.prefill + len(request.input_ids), self.cached + output.cached_tokens
            if episode.shared is None:
                episode.shared = output.cached_tokens
        response = known or Response(output)
        episode.made.append((request, response))
        if output.finish_reason is FinishReason.ABORT:
            self._paused.append((ask, response))
            return
        if known is None and self._durable is not None and len(output.weight_versions) == 1:
            self._durable.add(request, output, episode.prompt.uid, episode.index)
        sampled = Segment(
            output.output_ids,
            log_probs=output.output_log_probs,
            weight_versions=output.weight_versions,
            top1_ids=output.top1_ids,
            path=ask.path,
        )
        episode.grow(ask.segment, sampled)
        log_probs = output.output_log_probs if ask.log_probs else []
        self._host.send(Completed(ask.episode, ask.segment, output.output_ids, output.finish_reason, log_probs))

    def take_finished(self) -> list[Done]:
        """Return the episodes that have ended since the last call."""
        done, self._done = self._done, []
        return done

    def _fail(self, failed: Failed) -> None:
        """Begin the episode anew, with the same seeds, or do without it. Raises EnvironmentFailedError."""
        episode, limits = self._running.pop(failed.episode), self._limits
        self._all.remove(episode)
        self.failures[failed.kind] += 1
        if not failed.own or episode.attempts < limits.environment_retries:
            self._begin(episode.again(failed=failed.own))
            return
        self._lost.append(failed.problem)
        where = f"environment {limits.environment!r} on prompt {episode.prompt.uid}, sample {episode.index},"
        trace = f"\n{failed.trace}" if failed.trace else ""
        if limits.on_environment_failure == "stop":
            raise EnvironmentFailedError(f"{where} {failed.problem}; fix it, or set on_environment_failure{trace}")
        lost, begun = len(self._lost), len(self._lost) + len(self._all)
        if lost > limits.max_environment_failures * begun:
            (common, times), *_ = Counter(self._lost).most_common(1)
            raise EnvironmentFailedError(
                f"{lost} of {begun} episodes of a rollout have failed, a larger share than "
                f"environment.max_environment_failures = {limits.max_environment_failures:g}; most often ({times}): "
                f"{common}; last: {where} {failed.problem}{trace}"
            )
        masks = limits.on_environment_failure == "mask" or self._purpose
        self._done.append(Done(episode.group, episode.index, [] if masks else None))
        if not masks:
            self._cancel([n for n, other in self._running.items() if other.group == episode.group])

    def describe(self) -> str:
        """Return in words what is waited for."""
        waiting = len({ask.episode for _, ask in self._asked.values()})
        return (
            f"of {len(self._running)} episodes that run {waiting} wait for the policy, and "
            f"{len(self._running) - waiting} are in their environment"
        )

    def responses(self, version: int | None = None) -> dict[str, Response]:
        """Return what the policy has sampled, complete or not, by the digests of the requests, with the rewards that
        there are; only what weights ``version`` alone have sampled, where that is given."""
        return {
            key(request): response
            for episode in self._all
            if episode.made
            for request, response in episode.responses()
            if version is None or [one for one, _ in response.output.weight_versions] == [version]
        }

    def close(self, keep: Sequence[int] = ()) -> None:
        """End the rollout: what still runs is ended, but for the groups that it has to ``keep``, which become the first
        ones of the next rollout. Their requests have to be aborted then."""
        self._cancel([number for number, episode in self._running.items() if episode.group not in keep])
        self._kept = [episode for episode in self._all if episode.group in keep]
        for episode in self._kept:
            episode.group = keep.index(episode.group)

    def forget(self) -> None:
        """The responses of the groups that were not kept are needed no more."""
        self._all = self._kept

    def _cancel(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._host.send(Cancel(number))
            del self._running[number]


def joined_versions(begun: Sequence[tuple[int, int]], all_tokens: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the weight versions of a response that was continued. An engine takes those that it was given for its own:
    the first of ``all_tokens`` are ``begun`` by others."""
    versions, skipped = [*begun], sum(count for _, count in begun)
    for version, count in all_tokens:
        own = max(0, count - skipped)
        skipped = max(0, skipped - count)
        if own and versions and versions[-1][0] == version:
            versions[-1] = version, versions[-1][1] + own
        elif own:
            versions.append((version, own))
    return versions
