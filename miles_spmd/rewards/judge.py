"""The reward ``judge``: a language model reads the response and chooses a score. Here it is asked over an
OpenAI-compatible API; :mod:`miles_spmd.controller.generation.judge` asks engines of the run the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.plug_point import PlugInError, PlugPoint
from miles_spmd.plugins.reward import JudgeReader, RewardValue
from miles_spmd.rewards.adapters import BadReward
from miles_spmd.rewards.labels import last_boxed
from miles_spmd.rewards.remote import ServiceReward, asked, conversation, required, service
from miles_spmd.types.sample import Prompt, Sample

READERS: PlugPoint[JudgeReader] = PlugPoint("reward.judge_reader", {}, JudgeReader)
ATTEMPTS = 2  # times that the judge is asked where its reply has no score
_FIELD = re.compile(r"\{(prompt|response|label)\}")
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_MARKED = (re.compile(r"\[\[(.*?)\]\]", re.DOTALL), re.compile(r"<score>(.*?)</score>", re.DOTALL | re.IGNORECASE))
_NAMED = re.compile(
    r"\b(?:score|rating|grade|verdict|judge?ment)\b[\"'*_` ]*(?:is|:|=)[\"'*_` ]*(.*)", re.IGNORECASE
)  # fmt: skip
_AROUND = " \t\n\"'`*_.()[]"  # what may stand around a score


def judge(config: RewardConfig) -> ServiceReward:
    """Return the reward that asks ``reward.judge_url``. Raises PlugPointError where settings are missing."""
    url = required(config, "judge_url").rstrip("/") + "/chat/completions"
    template, model = required(config, "judge_prompt"), required(config, "judge_model")
    client = service("judge", config, url)

    async def score(sample: Sample) -> RewardValue:
        question = filled(template, sample)
        body = {"model": model, "messages": [{"role": "user", "content": question}], **config.judge_arguments}
        for attempt in range(ATTEMPTS):
            reply = _content(await asked(client, body), url)
            if (found := verdict(config, reply, attempt)) is not None:
                break
        assert found is not None
        return found

    return score


def verdict(config: RewardConfig, reply: str, attempt: int) -> RewardValue | None:
    """Return the reward that a judge's ``reply`` to the question means, which is number ``attempt``; None where it has
    to be asked again. Raises BadReward where the last reply has no score, unless there is a default."""
    found = _read(config, reply)
    if isinstance(found, Mapping):
        return found if config.judge_default is None else {"unreadable": 0.0, **found}
    if found is not None:
        return found if config.judge_default is None else {"score": found, "unreadable": 0.0}
    if attempt + 1 < ATTEMPTS:
        return None
    if config.judge_default is None:
        raise BadReward(
            f"got a reply of the judge without a score: {reply[-200:]!r}; let reward.judge_prompt ask for "
            "[[score]], raise max_tokens in reward.judge_arguments, or set reward.judge_default"
        )
    return {"score": config.judge_default, "unreadable": 1.0}


def _read(config: RewardConfig, reply: str) -> RewardValue:
    """Return what a reply says, None where it has no score. Raises BadReward where a user's reader fails; what that
    returns is examined as the result of any reward."""
    if config.judge_reader is None:
        return read_score(reply, config.judge_scores)
    try:
        return READERS.resolve(config.judge_reader)(reply)
    except PlugInError as error:
        raise BadReward(f"could not read a reply of the judge: {error}") from error


def filled(template: str, sample: Sample) -> str:
    """Return what the judge is asked. Braces of anything else stay, and so do those in a response."""
    label = sample.prompt.label
    values = {
        "prompt": _as_text(sample.prompt),
        "response": sample.text,
        "label": label if isinstance(label, str) else json.dumps(label, ensure_ascii=False, default=str),
    }
    return _FIELD.sub(lambda field: values[field[1]], template)


def read_score(reply: str, scores: Mapping[str, float]) -> float | None:
    r"""Return the score in a judge's reply: one of the names of ``scores`` in either case, or where there are none a
    number, also as in "7/10"; None if there is none.

    It is looked for behind ``</think>``: in the last ``[[...]]``, the last ``<score>...</score>``, the last
    ``\boxed{...}``, behind the last "score:" (rating, grade, verdict, judgment; also "is" or "="), and in the
    last line, in which it must stand alone. The first of these that there is counts.
    """
    text = reply.rpartition("</think>")[2].strip()
    for marked in _MARKED:
        if found := marked.findall(text):
            return _score(found[-1], scores, alone=True)
    if (boxed := last_boxed(text)) is not None:
        return _score(boxed, scores, alone=True)
    if named := _NAMED.findall(text):
        return _score(named[-1], scores, alone=False)
    return _score(text.rpartition("\n")[2], scores, alone=True)


def _score(text: str, scores: Mapping[str, float], *, alone: bool) -> float | None:
    """Return the score that ``text`` begins with, or that it is, if ``alone``."""
    text = text.strip(_AROUND)
    end = r"\Z" if alone else r"(?!\w)"
    if not scores:
        found = re.match(rf"({_NUMBER})(?:\s*/\s*\d+)?{end}", text)
        return float(found[1]) if found else None
    names = {name.lower(): score for name, score in scores.items()}
    longest_first = sorted(names, key=len, reverse=True)
    found = re.match(f"({'|'.join(map(re.escape, longest_first))}){end}", text, re.IGNORECASE)
    return names[found[1].lower()] if found else None


def _content(reply: Any, url: str) -> str:
    try:
        content = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        raise BadReward(f"got a reply from {url} that is not a chat completion: {reply!r:.200}") from None
    return content if isinstance(content, str) else ""


def _as_text(prompt: Prompt) -> str:
    """Return a prompt for the judge's eyes: without the tokens that a chat template writes."""
    messages = conversation(prompt)
    if messages is None:
        return prompt.text
    texts = [(str(message.get("role")), _plain(message.get("content"))) for message in messages]
    return texts[0][1] if len(texts) == 1 else "\n\n".join(f"{role}: {text}" for role, text in texts)


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")
