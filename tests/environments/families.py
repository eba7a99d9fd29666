"""Chat templates with the structural properties of well-known families, each in our own words, and a tokenizer that has
their special tokens. What a template does in later turns to what the assistant said is what makes a family.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from miles_spmd.data.tokenizer import Tokenizer


class Family(NamedTuple):
    template: str
    special: tuple[str, ...]
    call: str  # how a call is written, with NAME and ARGUMENTS (JSON) in it
    call_end: str  # the token that the policy samples behind calls
    text_end: str  # and behind a text
    format: str  # of calls
    added: tuple[str, ...] = ()  # tokens that are not special
    many: bool = True  # whether the format has several calls in a message
    rewrites_end: str | None = None  # what the template writes in place of text_end once messages follow


# ChatML with the results of tools together in one message of a user; reasoning is left out of earlier messages.
_QWEN = """\
{%- macro act(c) %}{{ '<tool_call>\n' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson
   + '\n</tool_call>' }}{% endmacro -%}
{%- if tools %}{{ '<|im_start|>system\nTools:\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- else -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- set is_last = m.role == 'assistant' and loop.last -%}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' if is_last -}}
{{- m.content or '' -}}
{%- for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}{{ act(c) }}{% endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""

# Trims all texts, writes results as JSON, refuses two calls in a message.
_LLAMA = """\
{{- bos_token -}}
{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' + (tools | tojson) + '<|eot_id|>' }}{% endif -%}
{%- for m in messages -%}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call in a message, please') }}{% endif -%}
{%- set f = m.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{{- '{"name": "' + f.name + '", "parameters": ' + (f.arguments | tojson) + '}' + '<|eot_id|>' -}}
{%- elif m.role == 'tool' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}
"""

# No line breaks, calls of special tokens, arguments as text; the prompt opens reasoning that history does not have.
_DEEPSEEK = """\
{{- bos_token -}}
{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' -%}
{%- if not loop.previtem or loop.previtem.role != 'tool' %}{{ '<｜Assistant｜>' }}{% endif -%}
{%- if m.tool_calls -%}
{{- (m.content or '') + '<｜tool▁calls▁begin｜>' -}}
{%- for c in m.tool_calls -%}
{{- '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' + eos_token -}}
{%- else %}{{ m.content.split('</think>')[-1] + eos_token }}{% endif -%}
{%- elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜><think>\n' }}{% endif -%}
"""

# No token ends a message: the policy samples the one that begins the next message. Arguments are not JSON.
_GLM = """\
[gMASK]<sop>
{%- if tools %}{{ '<|system|>\n' + (tools | tojson) }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if loop.previtem.role != 'tool' %}{{ '<|observation|>' }}{% endif -%}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
{%- else -%}
{{- '<|' + m.role + '|>\n' -}}
{{- m.content | trim if m.role == 'assistant' else m.content -}}
{%- for c in m.tool_calls or [] -%}
{{- '\n<tool_call>' + c.function.name -}}
{%- for k, v in c.function.arguments.items() -%}
{{- '\n<arg_key>' + k + '</arg_key>\n<arg_value>' + (v if v is string else v | tojson) + '</arg_value>' -}}
{%- endfor -%}
{{- '\n</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""

# Channels; another token ends a message once others follow; a result needs the name of its tool; the first call counts.
_HARMONY = """\
{{- '<|start|>system<|message|>Channels.<|end|>' -}}
{%- if tools %}{{ '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}{% endif -%}
{%- set last = namespace(name='') -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if not last.name %}{{ raise_exception('a result without a call') }}{% endif -%}
{{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) -}}
{{- '<|end|>' -}}
{%- elif m.tool_calls -%}
{%- set f = m.tool_calls[0].function -%}
{%- set last.name = f.name -%}
{%- if m.content is none %}{{ raise_exception('content is none') }}{% endif -%}
{{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' -}}
{{- (f.arguments | tojson) + '<|call|>' -}}
{%- elif m.role == 'assistant' -%}
{%- if loop.last -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.reasoning_content or '') + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') -}}
{%- else -%}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif -%}
"""

# Ids of nine characters, results with them; the system's message and the tools move to the last message of a user.
_MISTRAL = """\
{{- bos_token -}}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and m is sameas users[-1] %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif -%}
{{- '[INST]' + m.content + '[/INST]' -}}
{%- elif m.tool_calls -%}
{{- '[TOOL_CALLS] [' -}}
{%- for c in m.tool_calls -%}
{%- if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif -%}
{{- {'name': c.function.name, 'arguments': c.function.arguments} | tojson | trim('}') + '}, "id": "' + c.id + '"}' -}}
{{- ', ' if not loop.last -}}
{%- endfor -%}
{{- ']' + eos_token -}}
{%- elif m.role == 'tool' -%}
{{- '[TOOL_RESULTS]{"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- else %}{{ m.content + eos_token }}{% endif -%}
{%- endfor -%}
"""

_XML_CALL = "<tool_call>NAME\n<arg_key>value</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>"
FAMILIES = {
    "qwen": Family(
        _QWEN,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        '<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>',
        "<|im_end|>",
        "<|im_end|>",
        "hermes",
        added=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    ),
    "llama": Family(
        _LLAMA,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
        '<|python_tag|>{"name": "NAME", "parameters": ARGUMENTS}',
        "<|eom_id|>",  # while the template writes <|eot_id|>
        "<|eot_id|>",
        "llama3",
        many=False,
    ),
    "deepseek": Family(
        _DEEPSEEK,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
         "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
         "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "deepseekv31",
        added=("<think>", "</think>"),
    ),
    "glm": Family(
        _GLM,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        _XML_CALL,
        "<|observation|>",
        "<|user|>",
        "glm45",
        added=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<think>"),
    ),
    "harmony": Family(
        _HARMONY,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"),
        "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS",
        "<|call|>",
        "<|return|>",
        "gpt-oss",
        many=False,
        rewrites_end="<|end|>",
    ),
    "mistral": Family(
        _MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]",
         "[/AVAILABLE_TOOLS]"),
        '[TOOL_CALLS] [{"name": "NAME", "arguments": ARGUMENTS}]',
        "</s>",
        "</s>",
        "mistral",
        many=False,
    ),
}  # fmt: skip

_CORPUS = [
    "user assistant system tool What is the weather in Oslo? It is 19 degrees.",
    '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n',
    "Die Straße ist naß, 你好 world! <|end|> [INST]\n\n",
] * 4


def write_family(folder: Path, family: Family) -> Tokenizer:
    """Write a checkpoint folder with a byte-level BPE, trained here, and return its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(_CORPUS, trainer)
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.special])
    fast.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.added])
    fast.save(str(folder / "tokenizer.json"))
    first = next((text for text in family.special if "begin" in text or text == "<s>"), None)
    config = {"eos_token": family.text_end, "chat_template": family.template}
    if first is not None:
        config["bos_token"] = first
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)
