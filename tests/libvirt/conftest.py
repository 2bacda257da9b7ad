"""
Tests on a real libvirt daemon, started by the tests for themselves; nothing of the host's libvirt is seen or touched.

After each test nothing of it may be left: no process, no entry in /run/sevhop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.guests import counter, emulators
from tests.support.guests.build import Unavailable
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.machine import Accelerator
from tests.support.guests.running import wait_until

#: Starts a domain, a ``transient`` one if wanted; other keywords are fields of
#: :class:`tests.support.guests.daemon.Description`.
StartDomain = Callable[..., DomainGuest]


@pytest.fixture(scope="session")
def daemon(libvirt_of_ones_own: None) -> Iterator[Daemon]:
    """A daemon, with sevhop's hook."""
    with Daemon.installed() as daemon:
        yield daemon
        done = daemon.sevhop("uninstall")
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def newest(emulator: Callable[[str], Path]) -> Path:
    """Debian's newest QEMU."""
    return emulator(emulators.UNSTABLE)


@pytest.fixture
def start(daemon: Daemon, old: Path, accelerator: Accelerator, tmp_path: Path) -> Iterator[StartDomain]:
    """Start domains in the older QEMU; they are destroyed and undefined with the test."""
    try:
        counter.firmware()
    except Unavailable as err:
        pytest.skip(f"the bare-metal counter cannot be built: {err}")
    before = set(daemon.processes())
    with ExitStack() as guests:

        def one(*, transient: bool = False, **fields: object) -> DomainGuest:
            described: dict[str, object] = {
                "name": f"guest-{tmp_path.name[-20:]}",
                "emulator": old,
                "accelerator": accelerator,
                **fields,
            }
            description = Description(**described)  # type: ignore[arg-type]
            guest = (DomainGuest.create if transient else DomainGuest.start)(daemon, description)
            guests.callback(guest.end)
            return guest

        yield one
    assert daemon.left_over() == []
    wait_until(lambda: set(daemon.processes()) <= before, 30, "the last processes end")
