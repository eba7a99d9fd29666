"""A checkpoint's tokenizer in a process without torch.

``transformers.AutoTokenizer`` imports torch (seconds, and hundreds of MiB); the ``tokenizers`` library it wraps does
not, and neither does transformers' function that renders chat templates. Both are used here directly.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from miles_spmd.data.template import ChatTemplate, Conversation, Message, TokenizerError
from miles_spmd.models import read_config

Segment = tuple[str, bool]  # a part of a text, and whether it is trained


class Encoding(NamedTuple):
    ids: list[int]
    offsets: np.ndarray  # int [T, 2], first and last + 1 of each token's characters; none where no text is trained


class Text(NamedTuple):
    """Consecutive segments of a sequence; ``templated``: a chat template has written its special tokens; ``exact``:
    a trained segment begins where an engine begins to generate, so that no token may reach over that place."""

    segments: list[Segment]
    templated: bool
    exact: bool = True

    @property
    def whole(self) -> str:
        return "".join(text for text, _ in self.segments)

    @property
    def is_trained(self) -> bool:
        return any(trained for _, trained in self.segments)


class Tokenizer:
    """Reads ``tokenizer.json``, ``tokenizer_config.json`` and the chat template of a Hugging Face checkpoint folder."""

    def __init__(self, folder: Path | str) -> None:
        """Raises TokenizerError naming the file that is missing or unusable."""
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{path} does not exist; a checkpoint with another tokenizer format is converted by "
                f"transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is not a tokenizer of the `tokenizers` library: {error}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        added = self._fast.encode("a").special_tokens_mask
        self._added_behind = added[::-1].index(0) if 0 in added else 0  # tokens such as an end of sequence
        settings = _read_json(self.folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(settings, _read_json(self.folder / "special_tokens_map.json"))
        self.chat_template = ChatTemplate(self.folder, settings, self.special_tokens)
        for name, token in self.special_tokens.items():
            if self._fast.token_to_id(token) is None:
                raise TokenizerError(
                    f"{self.folder}/tokenizer_config.json names {name} {token!r}, which tokenizer.json does not have; "
                    f"save the tokenizer again with transformers' save_pretrained"
                )

    @property
    def vocab_size(self) -> int:
        """Number of tokens including added ones; the model's embedding may have more rows."""
        return self._fast.get_vocab_size()

    @cached_property
    def _first_unknown(self) -> int | None:
        """The first token that the model in this folder has no embedding for; None where it has one for each."""
        if not (self.folder / "config.json").is_file():
            return None
        rows = read_config(self.folder).get("vocab_size")
        largest = max(self._fast.get_vocab().values(), default=0)
        return rows if isinstance(rows, int) and rows <= largest else None

    def unknown_to_model(self, ids: Sequence[int]) -> str | None:
        """Return what is wrong with token ids that the model has no embedding for; None if there are none."""
        if self._first_unknown is None or (largest := max(ids, default=0)) < self._first_unknown:
            return None
        token = self._fast.id_to_token(largest)
        return f"token {largest} ({token!r}) is unknown to the model, whose vocab_size is {self._first_unknown}"

    @property
    def eos_token_id(self) -> int | None:
        token = self.special_tokens.get("eos_token")
        return None if token is None else self._fast.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_prompts(self, texts: Sequence[str], templated: Sequence[bool]) -> list[list[int]]:
        """Return the token ids of texts at the start of a context."""
        found = self.encode_texts([Text([(text, False)], t) for text, t in zip(texts, templated)])
        return [encoding.ids for encoding in found]

    def encode_texts(self, texts: Sequence[Text]) -> list[Encoding]:
        """Encode texts at the start of a context, each as a whole; with offsets if a segment is trained.

        A chat template writes its special tokens itself (``templated``). Plain text gets those that the tokenizer puts
        before it (Llama's BOS), unless it already starts with the BOS token; those that it puts behind a text, such as
        an end of sequence, are left out, since a response follows, or its own end.
        """
        bos = self.special_tokens.get("bos_token")
        trained = any(text.is_trained for text in texts)
        encode = self._fast.encode_batch if trained else self._fast.encode_batch_fast
        wholes = [text.whole for text in texts]
        complete = [t.templated or bool(bos and whole.startswith(bos)) for t, whole in zip(texts, wholes)]
        found: dict[int, Any] = {}
        for is_complete in (True, False):
            which = [i for i, c in enumerate(complete) if c == is_complete]
            found |= zip(which, encode([wholes[i] for i in which], add_special_tokens=not is_complete))
        ends = [
            len(found[i].ids) - (0 if is_complete else self._added_behind) for i, is_complete in enumerate(complete)
        ]
        if not trained:
            return [Encoding(found[i].ids[:end], np.zeros((0, 2), np.int64)) for i, end in enumerate(ends)]
        encodings = [_encoding(found[i], end) for i, end in enumerate(ends)]
        return [self._split_at_responses(text, encoding) for text, encoding in zip(texts, encodings)]

    def _split_at_responses(self, text: Text, encoding: Encoding) -> Encoding:
        """Encode again as an engine does, whose prompt ends before a response, if a token reaches over that place."""
        starts, position = [], 0
        for piece, trained in text.segments:
            starts += [position] if trained and text.exact else []
            position += len(piece)
        first, last = encoding.offsets.T
        crossed = [p for p in starts if ((first < p) & (p < last)).any()]
        if not crossed:
            return encoding
        whole = text.whole
        # With offsets, since earlier responses may be trained in it.
        parts = self.encode_texts([Text([(whole[: crossed[0]], True)], text.templated, exact=False)])
        for start, end in zip(crossed, [*crossed[1:], len(whole)]):
            tail = self._continue(whole[start:end])
            parts.append(Encoding(tail.ids, tail.offsets + start))
        return Encoding([i for part in parts for i in part.ids], np.concatenate([part.offsets for part in parts]))

    def encode_continuation(
        self, text: str, literal: Sequence[tuple[int, int]] = (), *, at_start: bool = False
    ) -> list[int]:
        """Encode a text that follows another one, or stands ``at_start`` of a context, where a chat template has
        written it. In the ranges of characters that are ``literal``, what spells a special token is text like any
        other."""
        encode = self._begin if at_start else self._continue
        ids, offsets = encode(text)
        cuts = set[int]()  # in the middle of what spells a special token, so that no part does
        for token, (start, end) in zip(ids, offsets.tolist()):
            if token in self._special_ids:
                cuts |= {
                    start + 1 if start >= first else first for first, last in literal if start < last and end > first
                }
        cuts -= {0, len(text)}
        if not cuts:
            return ids
        parts = itertools.pairwise([0, *sorted(cuts), len(text)])
        return [
            token
            for start, end in parts
            for token in self.encode_continuation(
                text[start:end], _within(literal, start, end), at_start=at_start and not start
            )
        ]

    @cached_property
    def _special_ids(self) -> set[int]:
        return {i for i, token in self._fast.get_added_tokens_decoder().items() if token.special}

    def _begin(self, text: str) -> Encoding:
        return _encoding(self._fast.encode(text, add_special_tokens=False))

    def _continue(self, text: str) -> Encoding:
        """Encode a text that follows another one, and hence has no beginning for a normaliser to change."""
        for before in "\n.a0":
            ids, offsets = _encoding(self._fast.encode(before + text, add_special_tokens=False))
            behind = int((offsets[:, 1] <= 1).sum())  # tokens of what stands before
            if behind < len(ids) and offsets[behind, 0] >= 1:
                return Encoding(ids[behind:], offsets[behind:] - 1)
        return self._begin(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = True,
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation by the checkpoint's chat template. Raises TemplateError."""
        return self.chat_template.render(Conversation(messages, tools, arguments or {}), add_generation_prompt)[0]


def _encoding(found: Any, end: int | None = None) -> Encoding:
    return Encoding(found.ids[:end], np.asarray(found.offsets, np.int64).reshape(-1, 2)[:end])


def _within(ranges: Sequence[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of ranges that lie between two places, counted from the first one."""
    clipped = [(max(first, start) - start, min(last, end) - start) for first, last in ranges]
    return [(first, last) for first, last in clipped if first < last]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TokenizerError(f"{path}: {error}") from error


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """Return token by name; the first source wins. Old files have a table with the token under ``content``."""
    found: dict[str, str] = {}
    for source in sources:
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.setdefault(name, token)
    return found
