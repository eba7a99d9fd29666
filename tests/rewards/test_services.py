"""Rewards over HTTP: the real pool, and a real server that a test decides about."""

from __future__ import annotations

import time
from typing import Any

import pytest

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.plugins.reward import RewardError, Score
from miles_spmd.rewards.adapters import BadReward
from miles_spmd.rewards.functions import load_reward
from miles_spmd.rewards.judge import filled, read_score
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.types.sample import Sample
from tests.rewards.test_pool import group
from tests.services.server import Reply, Server, serving

QUESTION = [{"role": "user", "content": "seven plus 12?"}]


def scores(samples: list[Sample], **settings: Any) -> list[Score]:
    with RewardPool(RewardConfig(**{"reward_workers": 1} | settings)) as pool:
        return pool.submit(samples).result(timeout=60)


def judged(server: Server, samples: list[Sample], **settings: Any) -> list[Score]:
    given = {"rm_type": "judge", "judge_url": server.url + "/v1/", "judge_model": "m", "judge_prompt": "{response}"}
    return scores(samples, **given | settings)


def chat(content: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


def test_remote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_API_KEY", "sesame")

    def reply(body: Any, number: int) -> Any:
        if number == 0:
            return Reply("busy", 503)
        return 2 if body["response"] == "19" else {"score": 0.5, "length": len(body["response"])}

    with serving(reply) as server:
        found = scores(
            group("19", "twenty", source="s", messages=QUESTION) + group("19", uid="gsm8k:2", label=None),
            rm_type="remote",
            remote_url=server.url + "/score",
            remote_key_variable="SCORER_API_KEY",
            reward_environment=["SCORER_API_KEY"],
        )
    assert found == [Score(2.0), Score(0.5, {"length": 6.0}), Score(2.0)]
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame"}
    text = {"prompt": "seven plus 12 =", "response": "19"}
    assert text | {"messages": QUESTION, "label": "19", "metadata": {"source": "s"}} in server.bodies
    assert server.bodies[-1] == text | {"messages": None, "label": None, "metadata": {}}


@pytest.mark.parametrize(
    ("reply", "settings", "problem"),
    [
        (Reply("down", 500), {"reward_timeout": 1}, r'got no reply from URL/s: status 500: "down" \(tried \d times'),
        (Reply("who?", 401), {}, 'got no reply from URL/s: status 401: "who\\?"'),
        ("much", {}, "returned 'much' instead of a finite number"),
        ({"points": 1}, {}, r"returned an object without 'score' \(it has points\)"),
    ],
)
def test_remote_errors(reply: Any, settings: dict[str, Any], problem: str) -> None:
    with serving(lambda *_: reply) as server:
        config = RewardConfig(**{"rm_type": "remote", "remote_url": server.url + "/s"} | settings)
        with pytest.raises(BadReward, match=problem.replace("URL", server.url)) as error:
            load_reward("remote", False, config).score(group("19"))
    assert error.value.index == 0


def test_a_service_that_stays_away_is_one_error() -> None:
    where = r"^reward 'remote' on prompt gsm8k:1, sample 0, got no reply from http://127\.0\.0\.1:9/s: Client.*tried"
    with pytest.raises(RewardError, match=where):
        scores(group("19"), rm_type="remote", remote_url="http://127.0.0.1:9/s", reward_timeout=1)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "reward.remote_url is not set, and the reward 'remote' requires it"),
        (
            {"remote_url": "http://x", "remote_key_variable": "NO_KEY"},
            "reward.remote_key_variable = 'NO_KEY' is not in",
        ),
    ],
)
def test_settings_are_checked_where_the_function_is_loaded(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlugPointError, match=problem):
        load_reward("remote", False, RewardConfig(rm_type="remote", **settings))


def test_judge() -> None:
    verdicts = {"19": "It matches.\n\n**Verdict: A**", "20": "Verdict: B", "?": "I cannot say."}
    with serving(lambda body, _: chat(verdicts[body["messages"][0]["content"].split("|")[1]])) as server:
        settings = {
            "judge_prompt": "{prompt}|{response}|{label}|{other}",
            "judge_scores": {"A": 1, "B": -1},
            "judge_arguments": {"temperature": 0},
        }
        samples = group("19", "20", "?", messages=QUESTION)
        with pytest.raises(RewardError, match=r"sample 2, got a reply of the judge without a score: 'I cannot say\.'"):
            judged(server, samples, **settings)
        found = judged(server, samples, judge_default=0, **settings)
    assert found == [Score(1, {"unreadable": 0}), Score(-1, {"unreadable": 0}), Score(0, {"unreadable": 1})]
    assert set(server.paths) == {"/v1/chat/completions"}
    messages = [{"role": "user", "content": "seven plus 12?|19|19|{other}"}]
    assert {"model": "m", "messages": messages, "temperature": 0} in server.bodies


def test_a_judge_is_asked_again_where_its_reply_has_no_score() -> None:
    with serving(lambda body, number: chat("[[7]]" if number else None)) as server:
        assert judged(server, group("19")) == [Score(7.0)]
    with (
        serving(lambda *_: {"error": "x"}) as server,
        pytest.raises(RewardError, match="is not a chat completion"),
    ):
        judged(server, group("19"))


def test_requests_at_the_same_time() -> None:
    with serving(lambda *_: time.sleep(0.1) or chat("[[1]]")) as server:
        assert judged(server, group(*"abcdefgh"), service_requests=4) == [Score(1.0)] * 8
    assert server.most_open == 4


def test_what_the_judge_sees() -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    (sample,) = group("{label} {x}", label={"a": [1]}, messages=talk)
    assert filled('{prompt}/{response}/{label}/{"x"}', sample) == (
        'system: Be brief.\n\nuser: Hi/{label} {x}/{"a": [1]}/{"x"}'
    )


NUMBERS = {
    "[[7]]": 7,
    "First [[2]], no: [[ 8.5 ]].": 8.5,
    "<think>Score: 3</think>\n<score>-1</score>": -1,
    r"So \boxed{0.25}": 0.25,
    "**Score:** 7/10\nbecause of 3 errors": 7,
    '{"reason": "2 errors", "score": 4}': 4,
    "The rating is 5.": 5,
    "It has 3 errors.\n6": 6,
    "3 of 4 are right": None,
    "Score: none": None,
    "[[none]] Score: 3": None,
    "": None,
}
WORDS = {
    "A": 1,
    "(b)": 0,
    "Grade: INCORRECT": 0,
    "Grade: correct, I think": 1,
    "Verdict: Ab": None,
    "A response as this one is bad.": None,
    "Reasons.\n\n**CORRECT**": 1,
}


@pytest.mark.parametrize(("reply", "score"), NUMBERS.items())
def test_numbers(reply: str, score: float | None) -> None:
    assert read_score(reply, {}) == score


@pytest.mark.parametrize(("reply", "score"), WORDS.items())
def test_words(reply: str, score: float | None) -> None:
    assert read_score(reply, {"A": 1, "B": 0, "CORRECT": 1, "INCORRECT": 0}) == score
