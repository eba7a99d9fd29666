"""The health of a host's GPUs, by NVML: memory errors, throttling, and the driver's error reports (Xid).

NVML is called directly: its library comes with the driver, and these functions have been the same for years
(https://docs.nvidia.com/deploy/nvml-api/). What a GPU or the driver does not support is left out.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

from miles_spmd.types.gpu_health import GpuHealth

LIBRARY = "libnvidia-ml.so.1"
CORRECTED, UNCORRECTED, SINCE_DRIVER_LOAD = 0, 1, 0
XID_EVENT = 8  # nvmlEventTypeXidCriticalError
TEMPERATURE = 0  # of the GPU itself
# Reasons for lower clocks that are trouble. An idle GPU, and one at its power limit, have lower ones, too.
THROTTLING = {0x08: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}


class _Event(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_void_p),
        ("type", ctypes.c_ulonglong),
        ("data", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class GpuMonitor(threading.Thread):
    """Reads the health of the GPUs with these ``uuids`` (as nvidia-smi prints them) whenever it is asked to, in its own
    thread: a call into a driver that hangs must not hold up a rank."""

    def __init__(self, uuids: Sequence[str]) -> None:
        super().__init__(name="GPU health", daemon=True)
        self._uuids = uuids
        self._asked = threading.Event()
        self._found: list[GpuHealth] = []
        self._lock = threading.Lock()

    def ask(self) -> None:
        """Have the GPUs read soon."""
        self._asked.set()

    def take(self) -> list[GpuHealth]:
        """Return what was read since the last call, [] if nothing."""
        with self._lock:
            found, self._found = self._found, []
        return found

    def run(self) -> None:
        try:
            reader = Reader(self._uuids)
        except OSError as error:
            print(f"GPU health is not measured: {error}", flush=True)
            return
        while True:
            self._asked.wait()
            self._asked.clear()
            found = reader.read()
            with self._lock:
                xids = {old.uuid: old.xids for old in self._found}  # an event is seen once
                self._found = [new.with_earlier(xids.get(new.uuid, ())) for new in found]


class Reader:
    """The GPUs with these ``uuids``. Memory errors are counted from here on. Raises OSError where NVML is missing."""

    def __init__(self, uuids: Sequence[str]) -> None:
        self._nvml: Any = ctypes.CDLL(LIBRARY)
        if self._nvml.nvmlInit_v2():
            raise OSError("NVML cannot be initialised")
        self._handles: dict[str, ctypes.c_void_p] = {}
        self._events = ctypes.c_void_p()
        watches = not self._nvml.nvmlEventSetCreate(ctypes.byref(self._events))
        self._watched = False
        for uuid in uuids:
            handle = ctypes.c_void_p()
            if self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
                continue
            self._handles[uuid] = handle
            if watches and not self._nvml.nvmlDeviceRegisterEvents(handle, ctypes.c_ulonglong(XID_EVENT), self._events):
                self._watched = True
        self._base = {uuid: (self._errors(uuid, CORRECTED), self._errors(uuid, UNCORRECTED)) for uuid in self._handles}

    def read(self) -> list[GpuHealth]:
        """Return the health of every GPU now."""
        xids = self._xids()
        found = []
        for uuid, handle in self._handles.items():
            corrected, uncorrected = self._base[uuid]
            temperature, reasons = ctypes.c_uint(), ctypes.c_ulonglong()
            self._nvml.nvmlDeviceGetTemperature(handle, TEMPERATURE, ctypes.byref(temperature))
            self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(reasons))
            found.append(
                GpuHealth(
                    uuid=uuid,
                    temperature=temperature.value,
                    corrected=max(0, self._errors(uuid, CORRECTED) - corrected),
                    uncorrected=max(0, self._errors(uuid, UNCORRECTED) - uncorrected),
                    throttled=[name for bit, name in THROTTLING.items() if reasons.value & bit],
                    xids=xids.get(handle.value or 0, []),
                )
            )
        return found

    def _errors(self, uuid: str, kind: int) -> int:
        count = ctypes.c_ulonglong()
        self._nvml.nvmlDeviceGetTotalEccErrors(self._handles[uuid], kind, SINCE_DRIVER_LOAD, ctypes.byref(count))
        return count.value

    def _xids(self) -> dict[int, list[int]]:
        """Return the error reports since the last call, by the GPU's handle."""
        found: dict[int, list[int]] = {}
        event = _Event()
        while self._watched and not self._nvml.nvmlEventSetWait_v2(self._events, ctypes.byref(event), ctypes.c_uint(0)):
            found.setdefault(event.device or 0, []).append(event.data)
        return found
