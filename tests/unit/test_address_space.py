"""A process exits, and its mappings stay: a file that is mapped for writing cannot be sealed against it (fcntl(2))."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sevhop_qmp.address_space import AddressSpace
from sevhop_qmp.errors import ProcessError

_MAP = """
import mmap, sys
mapping = mmap.mmap(int(sys.argv[1]), 4096)
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    yield fd
    os.close(fd)


@pytest.fixture
def process(memory: int) -> Iterator[subprocess.Popen[bytes]]:
    """One that has mapped the memory."""
    with subprocess.Popen(
        [sys.executable, "-c", _MAP, str(memory)], pass_fds=[memory], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as started:
        assert started.stdout
        started.stdout.readline()
        yield started
        started.kill()


def _seal(memory: int) -> None:
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def _mapped(memory: int) -> bool:
    try:
        _seal(memory)
    except OSError as err:
        assert err.errno == errno.EBUSY
        return True
    return False


def test_mappings_disappear_when_the_process_exits(process: subprocess.Popen[bytes], memory: int) -> None:
    assert _mapped(memory)
    process.kill()
    process.wait()
    assert not _mapped(memory)


def test_mappings_outlive_the_process_while_address_space_is_open(
    process: subprocess.Popen[bytes], memory: int
) -> None:
    with AddressSpace(process.pid):
        process.kill()
        process.wait()
        assert _mapped(memory)
    while _mapped(memory):
        pass


def test_process_keeps_running(process: subprocess.Popen[bytes]) -> None:
    with AddressSpace(process.pid):
        assert process.poll() is None
    assert process.poll() is None


def test_zombie_is_refused(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessError, match="No such process"):
        AddressSpace(process.pid)


def test_process_is_refused_if_it_exits_meanwhile(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def late(*args: Any) -> int:
        process.kill()
        process.wait()
        return read(*args)

    monkeypatch.setattr(os, "preadv", late)
    with pytest.raises(ProcessError, match="No such process"):
        AddressSpace(process.pid)


def test_missing_process_is_refused(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    with pytest.raises(ProcessError, match="No such file"):
        AddressSpace(process.pid)
