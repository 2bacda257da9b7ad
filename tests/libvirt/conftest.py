"""
Tests on a real libvirt daemon, started by the tests for themselves; nothing of the host's libvirt is seen or touched.

After each test nothing of it may be left: no process, no entry in /run/sevhop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bench.downtime import Sampler, memory_of

from tests.support.guests import counter, emulators
from tests.support.guests.build import ROOT, Unavailable, fetch
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.machine import Accelerator
from tests.support.guests.running import wait_until

from .restart_faults import surroundings_of
from .transit_guest import BRIDGED, SHORTEST, TransitGuest, end_everything

#: Starts a domain, a ``transient`` one if wanted; other keywords are fields of
#: :class:`tests.support.guests.daemon.Description`.
StartDomain = Callable[..., DomainGuest]


@pytest.fixture(scope="session")
def modular(request: pytest.FixtureRequest) -> Path | None:
    """The directory of virtqemud, if the tests shall run with that; built the first time."""
    if not request.config.getoption("--virtqemud"):
        return None
    try:
        return Path(fetch([ROOT / "tools" / "fetch-virtqemud"]))
    except Unavailable as err:
        pytest.skip(f"no virtqemud: {err}")


@pytest.fixture(scope="session")
def daemon(libvirt_of_ones_own: None, modular: Path | None) -> Iterator[Daemon]:
    """A daemon, with sevhop's hook."""
    with Daemon.installed(modular=modular) as daemon:
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
        counter.firmware(idle=True)
    except Unavailable as err:
        pytest.skip(f"the bare-metal counter cannot be built: {err}")
    before = set(daemon.processes())
    names: set[str] = set()
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
            names.add(guest.name)
            return guest

        yield one
    if left := daemon.left_over():
        for name in names:
            end_everything(daemon, name)
    assert left == []
    wait_until(lambda: set(daemon.processes()) <= before, 30, "the last processes end")


@pytest.fixture
def surroundings(daemon: Daemon) -> Iterator[None]:
    """What the domains of :mod:`.restart_faults` need, in order."""
    with surroundings_of(daemon):
        yield


@pytest.fixture
def transit(daemon: Daemon, start: StartDomain, request: pytest.FixtureRequest) -> Iterator[TransitGuest]:
    """A domain that counts. In the end everything of it is ended. The parameter are further elements, in XML."""
    with ExitStack() as resources:
        try:
            bridge = resources.enter_context(daemon.bridge())
        except Unavailable as err:
            pytest.skip(str(err))
        more = getattr(request, "param", "")
        name = f"transit-{abs(hash(request.node.name)) % 10**8}"
        guest = start(name=name, interface=BRIDGED.format(bridge), elements=more)
        resources.callback(end_everything, daemon, name)
        guest.wait_for_ticks()
        memory = memory_of(guest.pid)
        assert memory is not None
        sampler = resources.enter_context(Sampler(memory, SHORTEST))
        sampler.wait()
        yield TransitGuest(daemon, guest, sampler)
