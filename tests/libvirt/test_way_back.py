"""Rollbacks after a package update: the old emulator's path holds another program then, or none."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest, kill
from tests.support.guests.enclosure import GUESTS, PROGRAMS
from tests.support.guests.running import wait_until

from ..conftest import each_once
from .conftest import StartDomain
from .failing import DYING, wrapper

KEPT = "/var/lib/sevhop/emulators/"
#: Where packages install the emulator here.
INSTALLED = PROGRAMS / "qemu-system-x86_64"
#: A domain with this cannot be rehearsed.
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


@pytest.fixture
def install(daemon: Daemon, old: Path) -> Callable[..., None]:
    """Replaces the file of the installed emulator, as a package does; by the old one, by a program, or by nothing."""
    directory = daemon.root / str(PROGRAMS).lstrip("/")
    path = directory / INSTALLED.name

    def replace(emulator: Path | None, text: str = "") -> None:
        if emulator is None:
            path.unlink()
            return
        unpacked = directory / f"{path.name}.dpkg-new"
        if emulator == old:
            shutil.copy(old, unpacked)
        else:
            wrapper(daemon, unpacked.name, emulator, text)
        unpacked.rename(path)

    bundle = directory / "qemu-bundle"
    if not bundle.is_symlink():
        bundle.symlink_to("/")  # it finds its firmware as if it was in /usr/bin
    replace(old)
    return replace


@contextmanager
def modules_of(daemon: Daemon, emulator: Path) -> Iterator[None]:
    """
    Those of another emulator are installed as well. With them the one in /usr/bin does not start any more, which is
    used to verify once that this daemon calls the hook.
    """
    assert daemon.sevhop("install", "--verify").returncode == 0
    installed = "/usr/lib/x86_64-linux-gnu/qemu"
    assert daemon.run("mount", "--bind", f"{emulator.parents[2]}{installed}", installed).returncode == 0
    try:
        yield
    finally:
        daemon.run("umount", installed)


def version(guest: DomainGuest) -> int:
    """The major version of the QEMU that it runs in."""
    return int(guest.monitor("query-version")["return"]["qemu"]["major"])


def assert_in_kept(guest: DomainGuest) -> None:
    """It runs in its old QEMU, from a program that was kept, which its persistent definition does not name."""
    assert guest.state == "running"
    emulator = guest.emulator()
    assert emulator.startswith(KEPT) and emulator.endswith(f"/emulator{INSTALLED}")
    assert os.readlink(f"/proc/{guest.pid}/exe").startswith(KEPT)
    assert guest.emulator("--inactive") == str(INSTALLED)
    assert version(guest) == 7
    guest.wait_for_ticks()


def rolled_back(daemon: Daemon, start: StartDomain, install: Callable[..., None], new: Path) -> DomainGuest:
    """A guest that runs in a kept program; the one that is installed then is good."""
    guest = start(emulator=INSTALLED)
    guest.wait_for_ticks()
    install(new, DYING["dies at once"])
    report = daemon.upgrade(guest.name, "--no-transit", "--no-rehearsal")
    assert (report["status"], report["outcome"], report["notes"]) == (3, "rolled-back", []), report["reason"]
    install(new)
    assert_in_kept(guest)
    return guest


def assert_upgraded(daemon: Daemon, guest: DomainGuest, emulator: Path = INSTALLED) -> None:
    """Upgrade it, and nothing is left of what was kept."""
    options = [] if emulator == INSTALLED else ["--emulator", str(emulator)]
    report = daemon.upgrade(guest.name, *options)
    assert report["outcome"] == "done", report
    assert guest.emulator() == guest.emulator("--inactive") == str(emulator)
    assert version(guest) == 10
    guest.wait_for_ticks()
    assert daemon.left_over() == []


@pytest.mark.parametrize(("accelerated", "what"), each_once(["kvm", "tcg"], ["replaced", "deleted"]))
def test_guest_is_rolled_back_although_its_emulator_is_not_on_disk(
    daemon: Daemon,
    start: StartDomain,
    install: Callable[..., None],
    new: Path,
    accelerator: str,
    what: str,
    accelerated: str,
) -> None:
    if accelerated == "kvm" != accelerator:
        pytest.skip("there is no KVM")
    # A display that is in modules.
    video = "<video><model type='virtio'/></video>"
    guest = start(emulator=INSTALLED, accelerator=accelerated, more=video)
    guest.wait_for_ticks()
    pid = guest.pid
    if what == "replaced":
        install(new, DYING["dies at once"])
        options = ["--no-transit", "--no-rehearsal"]
    else:
        install(None)
        options = [
            "--no-transit",
            "--no-rehearsal",
            "--emulator",
            str(wrapper(daemon, "dies", new, DYING["dies at once"])),
        ]
    with modules_of(daemon, new):
        for _ in range(2):  # the second time from what is kept
            report = daemon.upgrade(guest.name, *options)
            assert (report["status"], report["outcome"], report["notes"]) == (3, "rolled-back", []), report["reason"]
            assert report["guest_state"] == "running in the old QEMU"
            assert guest.pid != pid
            assert_in_kept(guest)
            (row,) = json.loads(daemon.sevhop("status", "--json", guest.name).stdout)["domains"]
            assert (row["binary_state"], row["outdated"]) == (what, what == "replaced"), row
            assert row["blocker"] == ("" if what == "replaced" else f"emulator: {INSTALLED}: No such file or directory")
        assert len(list((daemon.root / KEPT.lstrip("/")).iterdir())) == 1
        install(new)
        assert_upgraded(daemon, guest)


def test_domain_that_cannot_be_rehearsed_is_upgraded_after_a_package_update(
    daemon: Daemon, start: StartDomain, install: Callable[..., None], new: Path
) -> None:
    guest = start(emulator=INSTALLED, more=TPM)
    guest.wait_for_ticks()
    install(new, DYING["dies at once"])
    report = daemon.upgrade(guest.name, "--no-transit")
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert [note.partition(":")[0] for note in report["notes"]] == ["not rehearsed"]
    assert_in_kept(guest)
    install(new)
    assert_upgraded(daemon, guest)


def test_program_that_is_not_needed_is_not_left(
    daemon: Daemon, start: StartDomain, install: Callable[..., None], old: Path, new: Path
) -> None:
    """One that was kept, and not restored: the upgrade succeeded, or was rolled back before the commit."""
    guest = start(emulator=INSTALLED)
    guest.wait_for_ticks()
    pid = guest.pid
    install(new, DYING["dies at once"])
    assert daemon.upgrade(guest.name, "--no-transit")["outcome"] == "refused"  # by its rehearsal
    assert (guest.pid, daemon.left_over()) == (pid, [])
    guest.wait_for_ticks()
    install(new)
    assert_upgraded(daemon, guest)


def test_recover_rolls_back_to_the_program_that_was_kept(
    daemon: Daemon, start: StartDomain, install: Callable[..., None], new: Path
) -> None:
    guest = start(emulator=INSTALLED)
    guest.wait_for_ticks()
    install(new, DYING["dies at once"])
    command = daemon.start_command(
        sys.executable, "-m", "sevhop.cli", "--verbose", "upgrade", guest.name, "--no-transit", "--no-rehearsal"
    )
    assert command.stderr is not None
    for line in command.stderr:
        if line.strip().endswith(": terminate"):
            kill(command.pid)
            break
    command.communicate(timeout=60)
    done = daemon.sevhop("recover")
    assert done.returncode == 0, done
    if "in a new process" in done.stdout:
        assert_in_kept(guest)
    else:  # killed before the commit
        assert (version(guest), guest.emulator()) == (7, str(INSTALLED))
    install(new)
    wait_until(lambda: daemon.sevhop("status").returncode == 0, 30, "the keeper exits")
    assert_upgraded(daemon, guest)


def test_kept_program_stays_as_long_as_a_saved_state_needs_it(
    daemon: Daemon, start: StartDomain, install: Callable[..., None], old: Path, new: Path
) -> None:
    guest = rolled_back(daemon, start, install, new)
    other = start(name="other")
    other.wait_for_ticks()
    daemon.virsh("managedsave", guest.name)
    assert daemon.upgrade(other.name, "--emulator", new)["outcome"] == "done"
    daemon.virsh("start", guest.name)
    assert_in_kept(guest)
    # In a file that libvirt does not know.
    image = GUESTS / "saved"
    daemon.virsh("save", guest.name, image)
    assert daemon.upgrade(other.name, "--emulator", old)["outcome"] == "done"
    daemon.virsh("restore", image)
    assert_in_kept(guest)
    # It is started by another QEMU, and nothing names the program any more.
    daemon.virsh("destroy", guest.name)
    daemon.virsh("start", guest.name)
    assert version(guest) == 10
    assert daemon.upgrade(other.name, "--emulator", new)["outcome"] == "done"
    assert daemon.left_over() == []


def test_upgrade_without_a_way_back_is_refused_unless_rehearsed(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """What a wrapper has added to the command line of QEMU is not known when it was replaced."""
    wrapped = wrapper(daemon, "wrapped", old, "")
    guest = start(emulator=wrapped, more=TPM)
    guest.wait_for_ticks()
    pid = guest.pid
    wrapper(daemon, "wrapped", new, "")
    report = daemon.upgrade(guest.name, "--no-transit")
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert "cannot rehearse the upgrade (-tpmdev" in report["reason"]
    why = f"cannot roll back to the old emulator: {wrapped} is QEMU 10"
    assert why in report["reason"]
    assert guest.pid == pid
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--no-transit", "--no-rehearsal")
    assert report["outcome"] == "done", report
    (note,) = report["notes"]
    assert note.startswith(why) and note.endswith(f"now, and {wrapped} was a program that runs QEMU")
    guest.wait_for_ticks()


def test_emulator_that_was_kept_cannot_be_chosen(
    daemon: Daemon, start: StartDomain, install: Callable[..., None], new: Path
) -> None:
    guest = rolled_back(daemon, start, install, new)
    report = daemon.upgrade(guest.name, "--emulator", guest.emulator())
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert "is kept for a rollback only" in report["reason"]
    assert_upgraded(daemon, guest)


def test_uninstall_leaves_the_program_that_a_guest_runs(
    daemon: Daemon, start: StartDomain, install: Callable[..., None], new: Path
) -> None:
    guest = rolled_back(daemon, start, install, new)
    try:
        done = daemon.sevhop("uninstall")
        assert done.returncode == 0
        assert done.stderr.startswith(
            f"sevhop: note: {KEPT.rstrip('/')} stays: guests that were rolled back run from it"
        )
        assert_in_kept(guest)
    finally:
        daemon.install()
    assert_upgraded(daemon, guest)
