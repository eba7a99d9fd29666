from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from miles_spmd.data.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["What is seven plus twelve? It is 19.", "Die Straße ist naß, 你好 world!", "user assistant system\n"] * 3


def write_tokenizer(folder: Path, chat_template: str | None = CHATML, bos: bool = False) -> Path:
    """A byte-level BPE checkpoint folder such as real models have."""
    folder.mkdir(parents=True, exist_ok=True)
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if bos:
        fast.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", fast.token_to_id("<s>"))])
        config["bos_token"] = "<s>"
    if chat_template is not None:
        config["chat_template"] = chat_template
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def tokenizer(chat_folder: Path) -> Tokenizer:
    return Tokenizer(chat_folder)
