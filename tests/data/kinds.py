"""Tokenizers of the kinds that checkpoints have, trained here, and chat templates in pairs: unmarked and marked."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CORPUS = [
    "What is seven plus twelve? It is 19.",
    "Die Straße ist naß, 你好 world!",
    "assistant: It is. user: and?",
    "[INST] why [/INST]",
] * 4


def _bpe(metaspace: str | None) -> FastTokenizer:
    """SentencePiece's BPE with byte fallback: a normaliser puts the blank in front (Llama 2's own files), or the
    pre-tokenizer does."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()  # SentencePiece merges nothing over a blank
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    fast.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    if metaspace is None:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fast.pre_tokenizer = None
        before = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        fast.decoder = decoders.Sequence(before)
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
        fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=metaspace)])
    data = json.loads(fast.to_str())  # the bytes of the fallback are entries of the vocabulary alone
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return FastTokenizer.from_str(json.dumps(data))


def _unigram() -> FastTokenizer:
    """SentencePiece's unigram with its default normalisation, as T5 and XLM-R have it."""
    fast = FastTokenizer(models.Unigram())
    fast.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, initial_alphabet=list("\n:[]/")
    )
    fast.train_from_iterator(CORPUS, trainer)
    return fast


def _byte_level(add_prefix_space: bool) -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(CORPUS, trainer)
    return fast


KINDS = {
    "bpe, normaliser prepends": lambda: _bpe(None),
    "bpe, metaspace first": lambda: _bpe("first"),
    "bpe, metaspace always": lambda: _bpe("always"),
    "unigram": _unigram,
    "byte level": lambda: _byte_level(False),
    "byte level, prefix blank": lambda: _byte_level(True),
}

_ROLES = "{%% if messages[0].role == 'system' %%}%s{%% endif %%}{%% for m in messages %%}{%% if m.role == 'user' %%}%s"
_ROLES += (
    "{%% elif m.role == 'assistant' %%}%s{%% endif %%}{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
)


def _template(system: str, user: str, before: str, assistant: str, after: str, marked: bool) -> str:
    said = "{% generation %}" + assistant + "{% endgeneration %}" if marked else assistant
    return _ROLES % (system, user, before + said + after, before)


# Every template writes what the assistant said in one piece, so that the marked and the unmarked form mean the same.
TEMPLATES = {
    "tags": (
        "{{ messages[0].content }}</s>\n", "<|user|>\n{{ m.content }}</s>\n", "<|assistant|>\n",
        "{{ m.content }}{{ eos_token }}", "{{ '\\n' }}",
    ),
    "inst": (
        "{{ messages[0].content }}\n", "{{ bos_token }}[INST] {{ m.content }} [/INST]", "",
        "{{ ' ' + m.content }}{{ eos_token }}", "",
    ),
    "words": (
        "{{ messages[0].content }}\n", "user: {{ m.content }}\n", "assistant:",
        "{{ ' ' + m.content }}{{ eos_token }}", "{{ '\\n' }}",
    ),
}  # fmt: skip


@cache  # training is not deterministic
def _trained(kind: str) -> FastTokenizer:
    return KINDS[kind]()


def write_kind(folder: Path, kind: str, template: str, marked: bool, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fast = _trained(kind)
    fast.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", fast.token_to_id("<s>"))])
    fast.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    (folder / "chat_template.jinja").write_text(_template(*TEMPLATES[template], marked=marked))
    return folder
