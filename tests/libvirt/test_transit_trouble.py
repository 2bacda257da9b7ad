"""
Trouble of libvirt's, or made by somebody else, while a guest runs in the transit: it goes on running, the reason is
reported in time, and when the trouble is over the upgrade is finished.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.running import processes_of_domain, wait_until

from ..conftest import some_of
from .conftest import StartDomain
from .failing import MARK, another_hook
from .lived import LivedInDomain
from .restart_faults import FAULTS
from .transit_guest import watched

#: Seconds for each step, and for a command as a whole: it tries the new emulator, then the old one.
STEP, COMMAND = 5, 60
LASTING = [name for name, fault in FAULTS.items() if fault.mend is not None]


#: Brings a guest into the transit, and returns the image that it can be restored from.
Prepare = Callable[[DomainGuest], str]


@pytest.fixture(params=["new", pytest.param("lived in", marks=pytest.mark.faults)])
def begin(
    daemon: Daemon, start: StartDomain, request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[..., DomainGuest]:
    """Starts a guest. Of one that has lived the settings are compared in the end."""
    if request.param == "new":
        return start
    return functools.partial(LivedInDomain.started, daemon, start, f"lived-{tmp_path.name[-20:]}")


@pytest.fixture
def prepared(daemon: Daemon, new: Path, record_property: Any) -> Iterator[Prepare]:
    """Until the end of the test that guest may not be stopped for long."""
    with contextlib.ExitStack() as watches:

        def prepare(guest: DomainGuest) -> str:
            guest.wait_for_ticks()
            watches.enter_context(watched(guest, record_property))
            report = daemon.upgrade(guest.name, "--emulator", new, "--prepare", "--timeout", str(STEP))
            assert (report["outcome"], report["in_transit"]) == ("prepared", True), report
            return str(report["image"])

        yield prepare


def recover(daemon: Daemon, guest: DomainGuest, step: int = STEP) -> tuple[int, str]:
    """It must end. :return: exit status, and what it prints."""
    began = time.monotonic()
    done = daemon.sevhop("recover", guest.name, "--timeout", str(step))
    assert time.monotonic() - began < COMMAND
    return done.returncode, done.stdout + done.stderr


def assert_waits(daemon: Daemon, guest: DomainGuest, reason: str, step: int = STEP) -> None:
    """The upgrade cannot be finished, for this reason; the guest runs."""
    status, text = recover(daemon, guest, step)
    assert (status, reason in text) == (4, True), text
    guest.wait_for_ticks()


def assert_arrives(daemon: Daemon, guest: DomainGuest, emulator: Path) -> None:
    """... as it was, and nothing is left."""
    done = daemon.sevhop("recover", guest.name, "--timeout", "60")
    assert done.returncode == 0, done
    assert (guest.state, guest.emulator(), guest.emulator("--inactive")) == ("running", str(emulator), str(emulator))
    if isinstance(guest, LivedInDomain):
        guest.see_unchanged()
    guest.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "the keeper exits")


@pytest.mark.parametrize("name", some_of(LASTING, 2))
@pytest.mark.usefixtures("surroundings")
def test_guest_runs_while_libvirt_cannot_start_its_domain(
    daemon: Daemon, begin: Callable[..., DomainGuest], prepared: Prepare, new: Path, name: str
) -> None:
    fault = FAULTS[name]
    guest = begin(**fault.domain)
    prepared(guest)
    fault.make(daemon, guest)
    assert_waits(daemon, guest, "")
    assert guest.state == "shut off"
    assert "the guest runs in the transit" in daemon.sevhop("status", guest.name).stdout
    assert fault.mend is not None
    fault.mend(daemon, guest)
    assert_arrives(daemon, guest, new)


SILENT = "libvirt did not answer"
#: What another hook does when libvirt starts the domain, and a part of the reason; none if it does no harm.
HOOKS = {
    "refuses": ("echo it may not >&2; exit 1", "it may not"),
    "prints": ("echo '<domain/>'; echo hello >&2", ""),
    "hangs": (f"while [ -e {MARK} ]; do sleep 0.1; done", SILENT),
    "leaves a process": (f"(while [ -e {MARK} ]; do sleep 0.1; done) &", SILENT),
    "calls libvirt": ("timeout 14 virsh domstate $1", "was ended"),
}


@pytest.mark.parametrize("what", some_of(HOOKS, 3))
def test_guest_runs_whatever_another_hook_does(
    daemon: Daemon,
    begin: Callable[..., DomainGuest],
    prepared: Prepare,
    new: Path,
    what: str,
) -> None:
    script, reason = HOOKS[what]
    guest = begin()
    prepared(guest)
    with another_hook(daemon, f'[ "$1 $2/$3" = "{guest.name} started/begin" ] || exit 0\n{script}'):
        if reason:
            assert_waits(daemon, guest, reason, COMMAND if what == "refuses" else STEP)
        else:
            assert_arrives(daemon, guest, new)
    if reason:
        wait_until(lambda: guest.state == "shut off", 60, "libvirt has given the new QEMU up")
        assert_arrives(daemon, guest, new)


@pytest.mark.parametrize("how", ["stopped", "gone"])
def test_guest_runs_while_libvirt_does_not_answer(
    daemon: Daemon, begin: Callable[..., DomainGuest], prepared: Prepare, new: Path, how: str
) -> None:
    guest = begin()
    prepared(guest)
    with contextlib.ExitStack() as trouble:
        if how == "gone":
            trouble.enter_context(daemon.gone())
        else:
            pid = daemon.pid_of_libvirtd
            os.kill(pid, signal.SIGSTOP)
            trouble.callback(os.kill, pid, signal.SIGCONT)
        status, text = recover(daemon, guest)
        assert status != 0, text
        assert "libvirt" in text
        guest.wait_for_ticks()
    assert_arrives(daemon, guest, new)


def test_guest_runs_while_the_disk_is_full(
    daemon: Daemon, begin: Callable[..., DomainGuest], prepared: Prepare, new: Path
) -> None:
    """That of the journal, and that of libvirt's logs."""
    guest = begin()
    prepared(guest)
    with full(daemon, "/var/lib/sevhop"), full(daemon, "/var/log/libvirt"):
        recover(daemon, guest)
        guest.wait_for_ticks()
    assert_arrives(daemon, guest, new)


#: Arguments: a directory, and a place to prepare what is mounted over it.
_FILL = """
mkdir "$2"
mount -t tmpfs -o "size=$(($(du -sk "$1" | cut -f1) * 2 + 256))k,mode=755" none "$2"
cp -a "$1/." "$2/"
mount --move "$2" "$1"
rmdir "$2"
cat /dev/zero 2>/dev/null >"$1/filler" || true
"""


@contextlib.contextmanager
def full(daemon: Daemon, directory: str) -> Iterator[None]:
    """Its file system has no space; what is written in there meanwhile is lost."""
    done = daemon.run("sh", "-ec", _FILL, "sh", directory, "/run/full")
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        daemon.run("umount", "--lazy", directory)


@pytest.mark.parametrize("words", [("start",), ("shutdown",), ("destroy",), ("suspend",), ("reset",)])
def test_operations_of_others_do_not_touch_the_guest(
    daemon: Daemon,
    begin: Callable[..., DomainGuest],
    prepared: Prepare,
    new: Path,
    words: tuple[str, ...],
) -> None:
    """The domain is shut off for libvirt, so nobody can do any harm but by starting it, which is refused."""
    guest = begin()
    prepared(guest)
    done = daemon.run("virsh", *words, guest.name)
    assert done.returncode == 1
    guest.wait_for_ticks()
    assert_arrives(daemon, guest, new)


def test_guest_runs_if_others_restore_its_domain_paused(
    daemon: Daemon, begin: Callable[..., DomainGuest], prepared: Prepare, new: Path
) -> None:
    """libvirt never accepts a destination then, so that is ended, and the guest goes on in the transit."""
    guest = begin()
    done = daemon.run("virsh", "restore", prepared(guest), "--paused")
    assert done.returncode == 0
    assert "the guest runs in the transit" in daemon.sevhop("status", guest.name).stdout
    guest.wait_for_ticks()
    wait_until(lambda: guest.state == "shut off", 60, "the new QEMU has ended")
    guest.wait_for_ticks()
    assert_arrives(daemon, guest, new)


@pytest.mark.parametrize("hopped", [False, True], ids=["saved before a hop", "saved after a hop"])
def test_other_image_of_the_domain_is_not_restored_beside_the_guest(
    daemon: Daemon, start: StartDomain, prepared: Prepare, old: Path, new: Path, hopped: bool
) -> None:
    """What is in there would run on the guest's disks, and only QEMU's locks would be against it."""
    guest = start(emulator=new if hopped else old)
    image = GUESTS / f"{guest.name}.save"
    guest.wait_for_ticks()
    if hopped:
        assert daemon.upgrade(guest.name, "--emulator", old)["outcome"] == "done"
    daemon.virsh("save", guest.name, image)
    daemon.virsh("restore", image)
    ours = prepared(guest)
    refused = daemon.run("virsh", "restore", image)
    assert refused.returncode == 1
    assert f"its guest runs in the transit; run: virsh restore {ours}" in refused.stderr
    assert len(processes_of_domain(guest.name)) == 1
    guest.wait_for_ticks()
    assert_arrives(daemon, guest, new)
