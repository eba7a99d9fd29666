"""Messages as bytes: msgpack by msgspec, decoded into declared types only, never pickle."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from miles_spmd.protocol.messages import Message

NUMBERS = "biuf"  # kinds of numpy dtypes that may be sent: bool, integers, floats


class WireError(ValueError):
    """Bytes that do not decode to a message, or a value that cannot be encoded; the text has the reason."""


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS:
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
    what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise WireError(f"{what} cannot be sent over the wire")


def _decode_array(kind: type, value: Any) -> Any:
    """An array is a view of the received bytes: read-only, and not copied."""
    if kind is np.ndarray:
        dtype, shape, data = value
        if np.dtype(dtype).kind not in NUMBERS:
            # object arrays would be pointers chosen by the sender, and raw records could contain them
            raise ValueError(f"array of dtype {dtype} is not allowed on the wire")
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)
    raise TypeError(f"{kind} has no wire format")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_decoder = msgspec.msgpack.Decoder(Message, dec_hook=_decode_array)


def encode(message: Message) -> bytes:
    """Raises WireError when the message holds a value without a wire format."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Raises WireError on everything that is not one of our messages."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise WireError(f"not a message of this protocol: {error}") from error
