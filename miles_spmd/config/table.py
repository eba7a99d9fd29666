"""What tables of settings are made of: their base class, types of values, and a walk over all settings of a table."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeGuard, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from miles_spmd.types.files import unusable

NONE = "none"  # TOML has no null: this string stands for it where a setting may be absent
MAX_NAME = 200  # bytes of a run's name: folders beside the run's add a suffix to it, and 255 is the limit
ENTRY = "N"  # stands for an entry's number in the path of a setting of a list of tables

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=2_000_000)]  # 23 days: ZMQ counts milliseconds in 32 bits
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    """A table of settings. Nested tables and lists of tables are fields whose types are tables."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _absent(cls, value: Any, info: ValidationInfo) -> Any:
        optional = NoneType in get_args(cls.model_fields[str(info.field_name)].annotation)
        return None if optional and value == NONE else value

    @field_validator("*")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        """Read ``~`` of a path as a shell does, which does not see it behind a setting's name."""
        return usable(Path(os.path.expanduser(value))) if isinstance(value, Path) else value


def plug_point(*builtins: str) -> AfterValidator:
    """Accept a built-in's name, or anybody's function as `module:function`."""
    allowed = " or ".join([", ".join(builtins), "`module:function`"]) if builtins else "`module:function`"

    def is_known(name: str) -> bool:
        module, _, function = name.partition(":")
        return name in builtins or bool(module and function)

    return must_be(allowed, is_known)


def must_be(what: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """Accept values for which ``holds``; the error message says that the value must be ``what``."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"must be {what}, got {value!r}")
        return value

    return AfterValidator(check)


# SGLang takes the top-1 token, and log-probs at temperature 1, below this.
Temperature = Annotated[float, Field(ge=0), must_be("0 or at least 1e-6", lambda value: value == 0 or value >= 1e-6)]

TopK = Annotated[int, must_be("-1 (the whole vocabulary) or positive", lambda top_k: top_k == -1 or top_k > 0)]


def _is_folder_name(name: str) -> bool:
    plain = name.isprintable() and not set(name) & set("/\\") and name.strip() == name
    own = re.sub(r"-(eval|replay-\d+|bisect-\d+)$", "", name)  # of the folder beside which such a run writes
    return plain and name not in ("", ".", "..") and len(own.encode()) <= MAX_NAME


FolderName = Annotated[
    str, must_be(f"the name of a folder: printable, without slashes, at most {MAX_NAME} bytes", _is_folder_name)
]


def usable(path: Path) -> Path:
    """Return ``path``. Raises ValueError where nothing can be looked up at it, which whoever opens it need not expect
    then."""
    if problem := unusable(path):
        raise ValueError(f"{problem}, got {str(path)!r}")
    return path


def names_function(source: str) -> bool:
    """Whether a data source is `module:function`, and not a file."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", source) is not None and not os.path.isfile(source)


def _is_data_file(source: str) -> str:
    usable(Path(os.path.expanduser(without_slice(source))))
    return source


def without_slice(source: str) -> str:
    """Return the path of a data file: ``source`` without `@[0:1000]`."""
    return re.sub(r"@\[[^\]]*\]$", "", source)


def _not_empty(value: Any) -> Any:
    if str(value) in ("", "."):
        raise ValueError("must not be empty")
    return value


NotEmpty = AfterValidator(_not_empty)
DataFile = Annotated[str, NotEmpty, AfterValidator(_is_data_file)]


class Setting(NamedTuple):
    path: tuple[str, ...]
    field: FieldInfo

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def is_table(self) -> bool:
        return is_table(bare(self.field.annotation))


def walk(table: type[Table], path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """All fields of ``table`` and of the tables inside it, in order, each table before its own fields."""
    for name, field in table.model_fields.items():
        yield Setting((*path, name), field)
        inner = bare(field.annotation)
        if get_origin(inner) is list:
            inner, steps = bare(get_args(inner)[0]), (*path, name, ENTRY)
        else:
            steps = (*path, name)
        if is_table(inner):
            yield from walk(inner, steps)


def header(path: tuple[str, ...]) -> str:
    """How TOML begins the table at ``path``: `[rollout]`, or `[[environments]]` for an entry of a list."""
    name = ".".join(part for part in path if part != ENTRY)
    return f"[[{name}]]" if path[-1] == ENTRY else f"[{name}]"


def child(annotation: Any, part: str) -> Any:
    """The annotation of a table's field ``part``, or of the entries of a list or dict; None where there is none."""
    annotation = bare(annotation)
    if is_table(annotation):
        field = annotation.model_fields.get(part)
        return None if field is None else field.annotation
    return get_args(annotation)[-1] if get_origin(annotation) in (list, dict) else None


def bare(annotation: Any) -> Any:
    """``annotation`` without Annotated and without None."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        some = [option for option in get_args(annotation) if option is not NoneType]
        return bare(some[0]) if len(some) == 1 else annotation
    return annotation


def is_table(annotation: Any) -> TypeGuard[type[Table]]:
    return isinstance(annotation, type) and issubclass(annotation, Table)
