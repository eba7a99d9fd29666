"""Maps memory of other processes on this host into this one through CUDA's inter-process handles.

Only memory from cudaMalloc can be exported, as the trainer's is; torch_memory_saver maps an engine's in another way.
"""

from __future__ import annotations

import ctypes
from functools import cache

import msgspec


class Export(msgspec.Struct, frozen=True):
    """Where a tensor lies in an allocation of another process."""

    handle: bytes
    offset: int  # bytes from the start of the allocation


class MappingError(RuntimeError):
    """The memory cannot be exported, or this GPU cannot access it."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


def export(address: int) -> Export:
    """Return what other processes need to map the allocation of a device address. Raises MappingError."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    handle = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return Export(bytes(handle), address - base.value)


def address(exported: Export) -> int:
    """Return the tensor's address in this process. An allocation is mapped once and for good. Raises MappingError."""
    return _open(exported.handle) + exported.offset


@cache
def _open(handle: bytes) -> int:
    base = ctypes.c_uint64()
    lazily_enable_peer_access = ctypes.c_uint(1)
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(base), _Handle.from_buffer_copy(handle), lazily_enable_peer_access)
    return base.value


def _call(function: str, *arguments: object) -> None:
    driver = ctypes.CDLL("libcuda.so.1")  # loaded once
    if status := getattr(driver, function)(*arguments):
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise MappingError(f"{function}: {(text.value or b'unknown error').decode()}")
