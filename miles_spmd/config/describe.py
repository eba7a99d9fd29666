"""The text of ``miles-spmd settings``: every setting with type, default and meaning, as text or as docs/settings.md."""

import json
import textwrap
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from miles_spmd.config import Config
from miles_spmd.config.backends import BACKENDS, REFUSED, backend_fields, backend_keys, refusal
from miles_spmd.config.table import ENTRY, NONE, Setting, Table, header, walk

BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
NAMES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": NONE}
INTRODUCTION = """\
# Settings

A configuration is a TOML file with the tables below. An override on the command line is `key=value`. The key is a
dotted path (`rollout.rollout_batch_size=8`), or the name of a setting alone where only one table has it
(`rollout_batch_size=8`). Keys of `[megatron]` and `[sglang]` need their table's name (`megatron.lr=1e-5`). Entries of
lists are numbered from 0, and the number after the last one appends an entry (`rollout_stop.0=END`). The value is TOML,
or else a bare string; for a setting whose type says "or none", `none` stands for an absent value.

Where a setting of TRL, transformers, veRL, slime or Miles is written, the error names the setting that does the same.

`miles-spmd settings WORD` prints the settings that contain a word, keys of `[megatron]` and `[sglang]` included.
`miles-spmd settings --markdown > docs/settings.md` writes this page.
"""


OF_BACKENDS = (
    "The keys and their defaults are those of the installed version; an unknown key is an error. Keys are refused "
    "where something else decides their value:"
)


class Description(NamedTuple):
    path: str
    type: str
    default: str
    meaning: str

    def contains(self, word: str) -> bool:
        return any(word.lower() in text.lower() for text in (self.path, self.default, self.meaning))


def describe_settings(word: str = "", root: type[Table] = Config) -> str:
    """All settings of ``root``, or those whose path, default or meaning contains ``word``, then also those of Megatron
    and SGLang. Empty if there is none."""
    own = [_describe(setting) for setting in walk(root) if not setting.is_table and setting.path[0] not in BACKENDS]
    backends = [d for table in BACKENDS for d in _describe_backend(table)] if word else []
    found = [description for description in (*own, *backends) if description.contains(word)]
    return "\n\n".join(
        f"{d.path}: {d.type}, {f'default {d.default}' if d.default else 'required'}\n"
        + textwrap.fill(d.meaning, 100, initial_indent="    ", subsequent_indent="    ")
        for d in found
    )


def settings_page(root: type[Table] = Config) -> str:
    """The contents of docs/settings.md."""
    return "\n".join([INTRODUCTION, *_sections(root)])


def _sections(root: type[Table]) -> Iterator[str]:
    settings = {setting.path: setting for setting in walk(root)}
    below: dict[tuple[str, ...], list[Setting]] = {}
    for setting in settings.values():
        if not setting.is_table:
            below.setdefault(setting.path[:-1], []).append(setting)
    for path, rows in below.items():
        if path:  # the root has nothing but tables
            table = path[:-1] if path[-1] == ENTRY else path
            lines = [(f"`{row.path[-1]}`", *_describe(row)[1:]) for row in rows]
            yield _section(header(path), _meaning(settings[table]), ("setting", "type", "default", "meaning"), lines)
    for name in BACKENDS:
        if (name,) in settings:
            keys = [(reason, ", ".join(f"`{key}`" for key in some.split())) for reason, some in REFUSED[name].items()]
            yield _section(f"[{name}]", f"{_meaning(settings[(name,)])} {OF_BACKENDS}", ("reason", "keys"), keys)


def _section(title: str, text: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return f"## {title}\n\n{text}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _describe(setting: Setting) -> Description:
    field = setting.field
    annotation: Any = Annotated[field.annotation, field]
    schema = TypeAdapter(annotation).json_schema()
    default = "" if field.is_required() else _toml(field.get_default(call_default_factory=True))
    return Description(setting.dotted, _type(schema), default, _meaning(setting))


def _type(schema: dict[str, Any]) -> str:
    """A type of JSON schema in the words of this page: `int > 0`, `"token" or "sequence"`, `list of str`."""
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(_toml(choice) for choice in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if "additionalProperties" in schema and "properties" not in schema:
        keys, values = schema.get("propertyNames", {}), schema["additionalProperties"]
        return f"mapping from {_type({'type': 'string'} | keys)} to {'any value' if values is True else _type(values)}"
    if "$ref" in schema:
        return "tables"
    name = "path" if schema.get("format") == "path" else NAMES[schema["type"]]
    bounds = " and ".join(f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema)
    return f"{name} {bounds}".strip()


def _describe_backend(table: str) -> Iterator[Description]:
    for key in backend_keys(table):
        field = backend_fields(table)[key]
        types = " or ".join(sorted(t.__name__ for t in field.types or ())) or "any"
        choices = " or ".join(_toml(choice) for choice in field.choices or () if choice is not None)
        meaning = refusal(table, key) or field.meaning
        yield Description(f"{table}.{key}", choices or types, _toml(field.default), meaning)


def _toml(value: Any) -> str:
    """``value`` as a TOML file has it, which for these types is as JSON has it."""
    return NONE if value is None else json.dumps(to_jsonable_python(value))


def _meaning(setting: Setting) -> str:
    return " ".join((setting.field.description or "").split())
