"""Upgrades that do not arrive: the guest runs on, and the user reads why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from sevhop_qmp import adopt_library
from sevhop_qmp.process import QemuProcess

from tests.support.guests.daemon import Daemon, kill
from tests.support.guests.enclosure import GUESTS, PROGRAMS
from tests.support.guests.running import wait_until

from ..conftest import some_of
from .conftest import StartDomain
from .failing import DYING, assert_as_before, other_hook_refuses, wrapper


@pytest.mark.parametrize("how", some_of(DYING))
def test_upgrade_rolls_back_if_destination_fails(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, how: str
) -> None:
    guest = start()
    guest.wait_for_ticks()
    emulator = wrapper(daemon, how.replace(" ", "-"), new, DYING[how])
    pid = guest.pid
    report = daemon.upgrade(guest.name, "--emulator", emulator, "--no-transit", "--no-rehearsal")
    assert report["status"] == 3, report
    assert report["outcome"] == "rolled-back"
    assert report["reason"].startswith("restore: ")
    assert guest.pid != pid
    assert_as_before(daemon, guest, old)
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()


@pytest.mark.parametrize("phase", some_of(["acquire", "rehearse", "prepare", "stop", "save"]))
def test_upgrade_rolls_back_or_completes_when_interrupted(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, phase: str
) -> None:
    guest = start()
    guest.wait_for_ticks()
    command = daemon.start_command(
        sys.executable,
        "-m",
        "sevhop.cli",
        "--verbose",
        "upgrade",
        "--no-transit",
        guest.name,
        "--json",
        "--emulator",
        new,
    )
    assert command.stderr is not None
    for line in command.stderr:
        if line.strip().endswith(f": {phase}"):
            command.send_signal(signal.SIGINT)
            break
    out, _ = command.communicate(timeout=120)
    report = json.loads(out)["domains"][0]
    # The signal races with the procedure. If it came too late the upgrade is done, all of it.
    if report["outcome"] == "done":
        assert command.returncode == 0
        assert guest.emulator() == str(new)
        guest.wait_for_ticks()
    else:
        assert (command.returncode, report["outcome"], report["reason"]) == (3, "rolled-back", "interrupted")
        assert_as_before(daemon, guest, old)


@pytest.mark.parametrize("phase", some_of(["save", "acquire", "rehearse", "prepare", "stop", "terminate", "restore"]))
def test_recover_resumes_guest_after_command_killed(daemon: Daemon, start: StartDomain, phase: str, new: Path) -> None:
    """Whatever was in progress: ``recover`` resumes the guest, in the old emulator or the new one."""
    guest = start()
    guest.wait_for_ticks()
    command = daemon.start_command(
        sys.executable, "-m", "sevhop.cli", "--verbose", "upgrade", "--no-transit", guest.name
    )
    assert command.stderr is not None
    for line in command.stderr:
        if line.strip().endswith(f": {phase}"):
            kill(command.pid)
            break
    command.communicate(timeout=60)
    refused = daemon.upgrade(guest.name)
    assert "run: sevhop recover" in refused["reason"]
    done = daemon.sevhop("recover")
    assert done.returncode == 0, done
    assert guest.state == "running"
    guest.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "the keeper exits")
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()


REFUSED = {
    "no emulator": (["--emulator", "/nonexistent"], "No such file"),
    "not executable": (["--emulator", "/etc/passwd"], "may not run /etc/passwd"),
    "no QEMU": (["--emulator", "/bin/true"], "not a QEMU"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_upgrade_refuses_a_bad_emulator(daemon: Daemon, start: StartDomain, old: Path, what: str) -> None:
    guest = start()
    guest.wait_for_ticks()
    argv, reason = REFUSED[what]
    pid = guest.pid
    report = daemon.upgrade(*argv, guest.name)
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert reason in report["reason"]
    assert report["downtime_ms"] is None
    assert guest.pid == pid
    assert_as_before(daemon, guest, old)


def test_emulator_that_others_may_change_is_refused(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    emulator = wrapper(daemon, "touched", new, "touch /run/touched", GUESTS)
    pid = guest.pid
    report = daemon.upgrade(guest.name, "--emulator", emulator)
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert f"everybody may write to {GUESTS}" in report["reason"]
    assert not (daemon.root / "run/touched").exists(), "it was not even started"
    assert guest.pid == pid
    assert_as_before(daemon, guest, old)


def test_emulator_that_qemus_user_cannot_reach_is_refused(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    closed = PROGRAMS / "closed"
    (daemon.root / str(closed).lstrip("/")).mkdir(0o700)
    report = daemon.upgrade(guest.name, "--emulator", wrapper(daemon, "qemu", new, "", closed))
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert "may not run" in report["reason"]
    assert_as_before(daemon, guest, old)


@pytest.mark.parametrize("memory", ["private", "file"])
def test_memory_that_is_no_shared_memfd_is_refused(daemon: Daemon, start: StartDomain, old: Path, memory: str) -> None:
    guest = start(memory=memory)
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name)
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert f"run: sevhop prepare {guest.name}; then shut the domain down and start it" in report["reason"]
    done = daemon.sevhop("check", guest.name)
    assert done.returncode == 1
    assert "FAIL memory" in done.stdout
    assert_as_before(daemon, guest, old)


def test_device_that_cannot_be_recreated_is_refused(daemon: Daemon, start: StartDomain, old: Path) -> None:
    directories = "<source dir='/usr'/><target dir='x'/>"
    guest = start(more=f"<filesystem type='mount' accessmode='mapped'>{directories}<readonly/></filesystem>")
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name)
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert "devices: <filesystem>" in report["reason"]
    assert_as_before(daemon, guest, old)


def test_upgrade_is_refused_during_a_block_job(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    daemon.virsh("blockcopy", guest.name, "vda", "--dest", GUESTS / f"{guest.name}.copy", "--transient-job")
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert "jobs: mirror" in report["reason"]
    found = daemon.sevhop("check", guest.name)
    assert "FAIL jobs: mirror" in found.stdout
    assert_as_before(daemon, guest, old)
    daemon.virsh("blockjob", guest.name, "vda", "--abort")
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()


def test_domain_that_is_off_is_refused(daemon: Daemon, start: StartDomain) -> None:
    guest = start()
    daemon.virsh("destroy", guest.name)
    report = daemon.upgrade(guest.name)
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert "is not running" in report["reason"]


def test_upgrade_is_refused_without_the_hook(daemon: Daemon, start: StartDomain, old: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    assert daemon.sevhop("uninstall").returncode == 0
    try:
        report = daemon.upgrade(guest.name)
    finally:
        daemon.install()
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert "sevhop install" in report["reason"]
    assert_as_before(daemon, guest, old)


def test_dry_run_touches_nothing(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    report = daemon.upgrade(guest.name, "--dry-run", "--emulator", new)
    assert (report["status"], report["outcome"], report["downtime_ms"]) == (0, "checked", None)
    assert guest.pid == pid
    assert_as_before(daemon, guest, old)


@pytest.mark.parametrize("destination", ["new", pytest.param("newest", marks=pytest.mark.faults)])
def test_upgrade_rolls_back_if_other_hook_refuses(
    daemon: Daemon, start: StartDomain, old: Path, destination: str, request: pytest.FixtureRequest
) -> None:
    """After ours has committed: the guest is restored all the same."""
    new: Path = request.getfixturevalue(destination)
    guest = start()
    guest.wait_for_ticks()
    with other_hook_refuses(daemon):
        report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"]) == (3, "rolled-back")
    assert_as_before(daemon, guest, old)


def test_upgrade_is_refused_during_a_save_job(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """Somebody saves the domain, to a slow target, and fails in the end."""
    guest = start()
    guest.wait_for_ticks()
    fifo = GUESTS / f"{guest.name}.fifo"
    inside = daemon.root / str(fifo).lstrip("/")
    os.mkfifo(inside)
    reader = os.open(inside, os.O_RDONLY | os.O_NONBLOCK)
    try:
        saving = daemon.start_command("virsh", "save", guest.name, fifo)
        wait_until(lambda: "Save" in daemon.run("virsh", "domjobinfo", guest.name).stdout, 30, "the job begins")
        report = daemon.upgrade(guest.name, "--emulator", new)
        assert (report["status"], report["outcome"]) == (1, "refused"), report["reason"]
        assert f"a job of domain {guest.name} is in progress" in report["reason"]
    finally:
        os.close(reader)
    saving.communicate(timeout=60)
    assert_as_before(daemon, guest, old)
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"


def test_domain_with_managed_save_image_is_refused(daemon: Daemon, start: StartDomain, old: Path) -> None:
    """libvirt would start the domain from it the next time, in whatever state that was."""
    guest = start()
    guest.wait_for_ticks()
    daemon.virsh("managedsave", guest.name)
    daemon.virsh("restore", f"/var/lib/libvirt/qemu/save/{guest.name}.save")
    report = daemon.upgrade(guest.name)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert f"virsh managedsave-remove {guest.name}" in report["reason"]
    daemon.virsh("managedsave-remove", guest.name)
    assert_as_before(daemon, guest, old)


def test_upgrade_removes_leftovers_of_earlier_hop(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """A link that leads nowhere, and a directory without a keeper."""
    guest = start()
    guest.wait_for_ticks()
    domains = daemon.root / "run/sevhop/domains"
    (domains / guest.name).symlink_to("../0123456789abcdef0123456789abcdef")
    assert "its keeper is gone" in daemon.sevhop("status", guest.name).stdout
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    assert daemon.left_over() == []
    (domains.parent / "0123456789abcdef0123456789abcdef").mkdir()
    (domains.parent / "0123456789abcdef0123456789abcdef" / "image").touch()
    (domains / guest.name).symlink_to("../0123456789abcdef0123456789abcdef")
    daemon.virsh("destroy", guest.name)
    daemon.virsh("start", guest.name)
    assert daemon.upgrade(guest.name)["outcome"] == "done"
    assert daemon.left_over() == []


def test_paused_guest_hops_again(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """It has not taken its disks from the QEMU before, and must not give up what it has not got."""
    guest = start()
    guest.wait_for_ticks()
    daemon.virsh("suspend", guest.name)
    for emulator in (old, new, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert report["outcome"] == "done", report
        assert guest.state == "paused"
    daemon.virsh("resume", guest.name)
    guest.wait_for_ticks()


def test_emulator_that_never_loads_the_library_is_refused(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    emulator = wrapper(daemon, "without-the-library", new, "unset LD_PRELOAD")
    pid = guest.pid
    report = daemon.upgrade(guest.name, "--emulator", emulator)
    assert (report["status"], report["outcome"]) == (1, "refused")
    assert f"{emulator} does not load" in report["reason"]
    assert guest.pid == pid
    assert_as_before(daemon, guest, old)


_WITH_A_CLOSED_LIBRARY = """
import sys
from pathlib import Path
from sevhop_qmp import adopt_library
path = Path(sys.argv[1])
adopt_library.path = lambda: path
from sevhop.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def test_library_that_qemus_user_cannot_read_is_reported_by_install_and_check(
    daemon: Daemon, start: StartDomain, tmp_path: Path, new: Path
) -> None:
    """As in a clone below /root. QEMU would start without it."""
    guest = start()
    guest.wait_for_ticks()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    library = closed / "adopt.so"
    shutil.copyfile(adopt_library.path(), library)
    argv = (sys.executable, "-c", _WITH_A_CLOSED_LIBRARY, library)
    process = QemuProcess.open(guest.pid)
    uid = process.credentials.uid
    process.close()
    reason = f"the user of QEMU ({uid}) cannot read {library} because of "
    installed = daemon.run(*argv, "install")
    assert installed.returncode == 1
    assert f"the hook is in place, but {reason}" in installed.stderr
    assert "install sevhop where all users may read it" in installed.stderr
    checked = daemon.run(*argv, "check", guest.name, "--emulator", new)
    assert checked.returncode == 1
    assert f"FAIL library: {reason}" in checked.stdout
    guest.wait_for_ticks()
