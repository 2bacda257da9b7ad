"""
The kernel's own tests of SEV pass here: tools/testing/selftests/kvm of its source, built by tools/lab/build-selftests.

`sev_migrate_tests` moves and mirrors contexts, of SEV and SEV-ES guests: along chains of VMs, from several threads at
once, and where the kernel must refuse it. `sev_smoke_test` runs guests that look for SEV in their processor, an SEV-ES
guest that gets its extended registers from the host, and one that shuts down. `sev_init2_tests` is about
KVM_SEV_INIT2.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.sevlab import kernels, selftests

#: Of a test that takes seconds.
LIMIT = 600
#: A line of the kernel's log that reports a bug in it.
_SPLAT = re.compile(r"WARNING:|BUG:|Oops|general protection fault|refcount_t:")


@pytest.fixture
def kernel_log() -> Iterator[int]:
    """A descriptor of the kernel's log, at its end."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.lseek(log, 0, os.SEEK_END)
    yield log
    os.close(log)


def _records(log: int) -> Iterator[str]:
    """What the kernel has logged."""
    while True:
        try:
            yield os.read(log, 8192).decode(errors="replace")
        except BlockingIOError:
            return


def _program(series: str, name: str) -> Path:
    if series not in kernels.SERIES:
        pytest.skip("Debian's source of this kernel is not known")
    program = selftests.programs(series) / name
    if not program.exists():
        pytest.skip(f"the source of Linux {series} has no {name}")
    return program


@pytest.mark.parametrize("name", selftests.PROGRAMS)
def test_selftest_of_the_kernel_passes(name: str, kernel: str, kernel_log: int) -> None:
    command = [_program(kernel, name)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stdout
    assert [line for line in _records(kernel_log) if _SPLAT.search(line)] == []
