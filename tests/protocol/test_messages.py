"""Every message survives the way through bytes, and nothing but our messages comes out of bytes."""

from __future__ import annotations

import enum
import math
import types
import typing
from typing import Any

import hypothesis.extra.numpy as hnp
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_spmd.protocol import messages
from miles_spmd.protocol.commands import COMMANDS, RESULTS, RefitEngine
from miles_spmd.protocol.messages import Call, Failure, Heartbeat, Reply, WireError, decode, encode
from miles_spmd.protocol.results import Ok, TrainResult
from miles_spmd.types.phase import Phase

ARRAYS = hnp.arrays(
    st.sampled_from([np.dtype(name) for name in ("float32", "float64", "int32", "int64", "bool", "uint8", "float16")]),
    hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=5),
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Anything that a field of this type may hold."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return st.none() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.lists(st.booleans())
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(argument) for argument in arguments])
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if origin is tuple:
        return st.tuples(*[values_of(argument) for argument in arguments])
    if kind is np.ndarray:
        return ARRAYS
    if issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    if issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: values_of(hints[name]) for name in kind.__struct_fields__})
    return {
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(),
        str: st.text(),
        bool: st.booleans(),
        types.NoneType: st.none(),
    }[kind]


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, msgspec.Struct):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__struct_fields__)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


MESSAGES = [
    *(kind for kind in typing.get_args(messages.Message) if kind not in (Call, Reply)),
    *(pytest.param((Call, command), id=f"Call-{command.__name__}") for command in COMMANDS),
    *(pytest.param((Reply, result), id=f"Reply-{result.__name__}") for result in (*RESULTS, Failure)),
]


@pytest.mark.parametrize("kind", MESSAGES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_round_trip(kind: Any, data: st.DataObject) -> None:
    if isinstance(kind, tuple):
        kind, inner = kind
        hints = typing.get_type_hints(kind)
        fields = {name: values_of(hints[name]) for name in kind.__struct_fields__}
        fields["command" if kind is Call else "result"] = values_of(inner)
        message = data.draw(st.builds(kind, **fields))
    else:
        message = data.draw(values_of(kind))
    assert same(decode(encode(message)), message)


HEARTBEAT = Heartbeat(rank=1, phase=Phase.TRAIN, step=3, detail="micro-batch 2/8")
RESULT = Reply(1, 0, "host", TrainResult([{}], 1.0, 1e-6, log_probs=[np.arange(4, dtype=np.float32)]))


@pytest.mark.parametrize("message", [HEARTBEAT, RESULT, Call(1, 2, 60.0, RefitEngine(3))])
def test_truncated_bytes_are_refused_at_every_length(message: messages.Message) -> None:
    data = encode(message)
    for length in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:length])


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data)


def changed(message: messages.Message, **fields: Any) -> bytes:
    plain = msgspec.msgpack.decode(encode(message))
    return msgspec.msgpack.encode(plain | fields)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (changed(HEARTBEAT, type="Shutdown"), "Shutdown"),
        (changed(HEARTBEAT, rank="1"), "rank"),
        (changed(HEARTBEAT, phase="lunch"), "lunch"),
        (msgspec.msgpack.encode({"type": "Heartbeat", "rank": 1}), "missing required field"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode(data)


def with_array(array: list[Any]) -> bytes:
    plain = msgspec.msgpack.decode(encode(RESULT))
    plain["result"]["log_probs"] = [array]
    return msgspec.msgpack.encode(plain)


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(["|O", [1], b"\0" * 8], id="objects"),
        pytest.param(["|V8", [1], b"\0" * 8], id="raw memory"),
        pytest.param(["i4,O", [1], b"\0" * 12], id="objects in a record"),
        pytest.param(["<f4", [3], b"\0" * 8], id="shape does not fit"),
        pytest.param(["<f4", [2]], id="no data"),
        pytest.param(["nonsense", [2], b"\0" * 8], id="no dtype"),
        pytest.param("text", id="no array"),
    ],
)
def test_bad_arrays_are_refused(array: Any) -> None:
    assert decode(with_array(["<f4", [2], b"\0" * 8])).result.log_probs[0].tolist() == [0, 0]  # type: ignore[union-attr]
    with pytest.raises(WireError):
        decode(with_array(array))


def test_objects_are_not_sent() -> None:
    sums = TrainResult([{}], 1.0, 1e-6, log_probs=[np.array([object()])])
    with pytest.raises(WireError, match="array of object"):
        encode(Reply(1, 0, "host", sums))
    with pytest.raises(WireError, match="object cannot be sent"):
        encode(Reply(1, 0, "host", Ok({"detail": object()})))
