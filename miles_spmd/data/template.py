"""A checkpoint's chat template: from a conversation to text, by transformers' own renderer, which imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from miles_spmd.config import DataConfig
from miles_spmd.config.data import TEMPLATE_VARIABLES

Message = dict[str, Any]  # {"role": ..., "content": ..., ...} as chat templates take it
Span = tuple[int, int]  # first character of a part of a text, and the first one behind it

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "Qx7"  # a text that no template writes of its own accord


class TokenizerError(ValueError):
    """A checkpoint folder whose tokenizer or chat template cannot be used."""


class TemplateError(TokenizerError):
    """A conversation that the chat template rejects."""


class UnusableTemplateError(TemplateError):
    """A checkpoint without a chat template, or with one that no conversation can be rendered by."""


class Conversation(NamedTuple):
    """What a chat template is given. ``messages`` are as the data has them, with all of their fields."""

    messages: list[Message]
    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = {}  # further variables of the template, such as enable_thinking

    def first(self, count: int) -> Conversation:
        """The conversation of the first ``count`` messages."""
        return self._replace(messages=self.messages[:count])


class ChatTemplate:
    """The named templates of a checkpoint folder: ``default``, and ``tool_use`` for conversations with tools."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
        """``settings`` are those of tokenizer_config.json, in which old checkpoints have their templates."""
        self._folder, self._special_tokens = folder, special_tokens
        configured = settings.get("chat_template") or {}
        if isinstance(configured, list):
            try:
                configured = {entry["name"]: entry["template"] for entry in configured}
            except (TypeError, KeyError):
                configured = None
        named = {"default": configured} if isinstance(configured, str) else configured
        if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
            raise TokenizerError(
                f"{folder}/tokenizer_config.json: chat_template is neither text nor a list of named texts; put it into "
                "chat_template.jinja"
            )
        self._named: dict[str, str] = dict(named)
        if (path := folder / "chat_template.jinja").is_file():
            self._named = {"default": _read(path)}
        for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
            self._named[path.stem] = _read(path)

    @property
    def exists(self) -> bool:
        """Whether there is one for conversations without tools."""
        return "default" in self._named

    @property
    def reads_clock(self) -> bool:
        return any("strftime_now" in template for template in self._named.values())

    def _template_of(self, conversation: Conversation) -> str:
        uses_tools = conversation.tools is not None and "tool_use" in self._named
        template = self._named.get("tool_use" if uses_tools else "default")
        if template is None:
            raise UnusableTemplateError(
                f"{self._folder} has no chat template: add chat_template.jinja, or give plain strings as prompts "
                f"and leave data.apply_chat_template off"
            )
        return template

    def marks_assistant(self, conversation: Conversation) -> bool:
        """Whether the template marks what the assistant writes by ``{% generation %}``. Raises TemplateError."""
        return _GENERATION.search(self._template_of(conversation)) is not None

    def render(self, conversation: Conversation, add_generation_prompt: bool) -> tuple[str, list[Span] | None]:
        """Return the text of a conversation, and the ranges of characters that the template marks with
        ``{% generation %}`` as the assistant's; None where it has no such marks. Raises TemplateError."""
        messages = conversation.messages
        if any(isinstance(message.get("content"), list) for message in messages) and not self._takes_parts:
            messages = [_joined(message) for message in messages]
        return self._render(conversation._replace(messages=messages), add_generation_prompt)

    def _render(self, conversation: Conversation, add_generation_prompt: bool) -> tuple[str, list[Span] | None]:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        template, marked = self._template_of(conversation), self.marks_assistant(conversation)
        variables: dict[str, Any] = {
            "strftime_now": fixed_clock(DataConfig.model_fields["chat_template_date"].default),
            **self._special_tokens,
            **conversation.arguments,
            "tools": conversation.tools,
            "add_generation_prompt": add_generation_prompt,
        }
        render: Any = render_jinja_template  # annotated to return a string, returns ([text], [spans])
        try:
            texts, spans = render(
                [conversation.messages], chat_template=template, return_assistant_tokens_mask=marked, **variables
            )
        except TemplateSyntaxError as error:
            raise UnusableTemplateError(
                f"the chat template of {self._folder} is not valid in line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:  # a template can raise anything, a recursion without end included
            raise TemplateError(f"the chat template rejects this conversation: {error}") from error
        return texts[0], [tuple(span) for span in spans[0]] if marked else None

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes the text of a content that is a list of parts, rather than the list."""
        parts = [{"type": "text", "text": _PROBE}]
        try:
            text, _ = self._render(Conversation([{"role": "user", "content": parts}]), add_generation_prompt=False)
        except UnusableTemplateError:
            raise
        except TemplateError:
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text


def fixed_clock(date: str) -> Callable[[str], str]:
    """Return the ``strftime_now`` of templates at 0:00 of a date in ISO format: what is rendered must not depend on
    when a run is started, resumed or replayed."""
    return datetime.fromisoformat(date).strftime


def check_arguments(arguments: Any) -> Mapping[str, Any]:
    """Return further variables of a template. Raises TypeError."""
    if not isinstance(arguments, dict):
        raise TypeError(f"{type(arguments).__name__} instead of an object")
    if taken := TEMPLATE_VARIABLES.intersection(arguments):
        raise TypeError(f"{', '.join(sorted(taken))} cannot be given here")
    return arguments


def _joined(message: Message) -> Message:
    """Return a message with the texts of its parts as one string, for templates that write a content as it is."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part if isinstance(part, str) else part["text"] for part in content)}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableTemplateError(f"{path} is not UTF-8: {error}") from error
