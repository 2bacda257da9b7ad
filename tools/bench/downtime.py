"""
Guest downtime, measured in the guest.

The guest is the bare-metal counter: a number in its memory grows for as long as it runs. Its memory is a file that is
shared with QEMU, so a small program with realtime priority (``sampler.c``) reads that number from outside, 10 times in
a millisecond; less often while the guest is stopped, so that a downtime is known to 1.6 %. What a tool reports is not
used.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.guests import build, counter
from tests.support.guests.running import GuestFailed, wait_until

_SOURCE = Path(__file__).with_name("sampler.c")
_TIMEOUT = 60.0
_FILL = 2 << 20
_PAGE = 4096


class Sampler:
    """
    Samples a guest's number until :meth:`stop`. A context manager.

    :param shortest: gaps that are shorter than this do not count, ms.
    :ivar began: when the number began to grow, ns; 0 until then.
    :ivar gaps: (from, to) of each time it did not grow, ns.
    :ivar last: when it grew for the last time, ns.
    """

    def __init__(self, memory: Path, shortest: int = 1) -> None:
        self.began = 0
        self.gaps: list[tuple[int, int]] = []
        self.last = 0
        self._fd = os.open(memory, os.O_RDONLY | os.O_CLOEXEC)
        self._process = subprocess.Popen(
            [_program(), memory, hex(counter.COUNTER), str(shortest * 1_000_000)],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        os.close(self._fd)

    def wait(self) -> None:
        """
        Wait until the number grows.

        :raises GuestFailed: the memory cannot be read.
        """
        assert self._process.stdout is not None
        self._read(self._process.stdout.readline())
        if not self.began:
            raise GuestFailed("cannot read the guest's memory")

    def see_growth(self) -> None:
        """
        Wait until the number grows again, since a gap is reported at its end.

        :raises GuestFailed: it does not.
        """
        before = self._number()
        wait_until(lambda: self._number() != before, _TIMEOUT, "the guest counts")

    def _number(self) -> bytes:
        return os.pread(self._fd, 8, counter.COUNTER)

    def stop(self) -> None:
        """Stop sampling."""
        self._process.terminate()
        for line in self._process.communicate(timeout=_TIMEOUT)[0].splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        match line.split():
            case ["first", time]:
                self.began = int(time)
            case ["gap", start, end]:
                self.gaps.append((int(start), int(end)))
            case ["last", time]:
                self.last = int(time)

    @property
    def longest(self) -> tuple[int, int]:
        """The longest gap: from, to. Empty if there was none."""
        return max(self.gaps, key=lambda gap: gap[1] - gap[0], default=(self.last, self.last))


def _program() -> Path:
    def compile_it(target: Path) -> None:
        build.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target, _SOURCE])

    return build.built("sampler", [_SOURCE], compile_it)


def memory_of(pid: int) -> Path | None:
    """
    The file of the guest's memory in a QEMU process: the largest of its memfds.

    :return: None when there is none yet, or no such process.
    """
    sizes: dict[int, Path] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            entry = Path(f"/proc/{pid}/fd/{number}")
            # Descriptors come and go.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if os.readlink(entry).startswith("/memfd:memory-backend-memfd"):
                    sizes[os.stat(entry).st_size] = entry
    # A new one has 0 bytes.
    return sizes[max(sizes)] if sizes and max(sizes) > counter.COUNTER else None


def touch(memory: Path) -> None:
    """Give every page of the guest's memory that the guest does not use a content of its own."""
    fd = os.open(memory, os.O_RDWR | os.O_CLOEXEC)
    try:
        block = bytearray(os.urandom(_FILL))
        for offset in range(counter.PATTERN_END, os.fstat(fd).st_size, _FILL):
            for page in range(0, _FILL, _PAGE):
                block[page : page + 8] = (offset + page).to_bytes(8, "little")
            os.pwrite(fd, block, offset)
    finally:
        os.close(fd)
