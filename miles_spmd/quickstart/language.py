"""The words and the chat template of a task, from which its tokenizer is made."""

from __future__ import annotations

import re
from typing import NamedTuple

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}<|tools|>{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Language(NamedTuple):
    """``words`` are the texts that are one token each; ``markers`` the special tokens with which the chat template
    begins a message, or the list of tools."""

    words: tuple[str, ...]
    markers: tuple[str, ...] = ("<|user|>", "<|assistant|>")

    @property
    def special(self) -> tuple[str, ...]:
        return PAD, END, UNKNOWN, *self.markers

    @property
    def vocabulary(self) -> dict[str, int]:
        return {token: i for i, token in enumerate((*self.special, *self.words))}

    @property
    def pattern(self) -> str:
        """Regular expression of a token: the longest word that fits, else other letters together, else a character."""
        longest_first = sorted(self.words, key=len, reverse=True)
        return "|".join([*map(re.escape, longest_first), "[A-Za-z_]+", r"[\s\S]"])
