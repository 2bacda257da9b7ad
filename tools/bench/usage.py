"""
The cost for the host besides the downtime: processor time and memory of all processes that take part.

They are children of the benchmark, which enters a cgroup of its own, and the kernel counts for that cgroup
(Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/cpuacct.rst, cgroup-v1/memory.rst). The page cache of written files
counts as memory, since it evicts other pages.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_ROOT = Path("/sys/fs/cgroup")
_MIB = 1 << 20


@dataclass
class Used:
    """
    :ivar elapsed_ms: the duration.
    :ivar cpu_ms: processor time, including guest and sampler.
    :ivar memory_mib: the peak, less the usage at the beginning.
    """

    elapsed_ms: float = 0.0
    cpu_ms: float = 0.0
    memory_mib: float = 0.0


class Usage:
    """
    A cgroup for the processes of the benchmark. A context manager.

    :raises OSError: the host has no such controllers, or the cgroup cannot be created.
    """

    def __init__(self) -> None:
        unified = (_ROOT / "cgroup.controllers").exists()
        controllers = [_ROOT] if unified else [_ROOT / "cpuacct", _ROOT / "memory"]
        self._homes = [controller / _group(controller).lstrip("/") for controller in controllers]
        self._groups = [controller / f"sevhop-bench-{os.getpid()}" for controller in controllers]
        self._cpu = self._groups[0] / ("cpu.stat" if unified else "cpuacct.usage")
        self._memory = self._groups[-1] / ("memory.current" if unified else "memory.usage_in_bytes")
        self._peak = self._groups[-1] / ("memory.peak" if unified else "memory.max_usage_in_bytes")

    def __enter__(self) -> Self:
        try:
            for group in self._groups:
                group.mkdir()
                _enter(group)
            for file in (self._cpu, self._memory, self._peak):
                file.stat()
        except OSError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group, home in zip(self._groups, self._homes, strict=True):
            with contextlib.suppress(OSError):
                _enter(home)
                group.rmdir()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Used]:
        """Count; the result is set at the end."""
        used = Used()
        with open(self._peak, "r+b", buffering=0) as peak:
            # Reset the peak, for this open file (v2, since Linux 6.12) or for all (v1).
            peak.write(b"0")
            memory, cpu, began = int(self._memory.read_bytes()), self._cpu_ms(), time.monotonic()
            yield used
            used.elapsed_ms = (time.monotonic() - began) * 1e3
            used.cpu_ms = self._cpu_ms() - cpu
            peak.seek(0)
            used.memory_mib = (int(peak.read()) - memory) / _MIB

    def _cpu_ms(self) -> float:
        fields = self._cpu.read_text().split()
        return int(fields[1]) / 1e3 if fields[0] == "usage_usec" else int(fields[0]) / 1e6


@contextlib.contextmanager
def counting(usage: Usage | None) -> Iterator[Used | None]:
    """Count if that is possible."""
    if usage is None:
        yield None
    else:
        with usage.counting() as used:
            yield used


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n")


def _group(controller: Path) -> str:
    """The cgroup of this process."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        if (number == "0") if controller == _ROOT else (controller.name in names.split(",")):
            return path
    raise OSError(f"no cgroup of {controller}")
