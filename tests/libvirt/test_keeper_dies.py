"""The keeper or its supervisor is killed in every state of an upgrade: the guest is not affected."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest

from ..conftest import some_of
from . import dying
from .conftest import StartDomain
from .transit_guest import KEEPER, SUPERVISOR

_PROGRAM = Path(dying.__file__)

#: Moments inside libvirt's restore: the state, the hook's step, and whether that is before our own hook or after it.
STEPS = {
    "restore has begun": ("restoring", "prepare/begin", "zz"),
    "destination is complete": ("restoring", "started/begin", "aa"),
    "committed": ("committed", "started/begin", "zz"),
}
MOMENTS = [*dying.CALLS, *STEPS]


@pytest.fixture(autouse=True)
def states(daemon: Daemon) -> Iterator[Path]:
    """The file with the states in which a process was killed."""
    path = daemon.root / str(dying.STATES).lstrip("/")
    yield path
    path.unlink(missing_ok=True)
    for hook in (daemon.root / "etc/libvirt/hooks/qemu.d").glob("*-dying"):
        hook.unlink()


def upgrade_with(daemon: Daemon, victim: str, moment: str, name: str, emulator: Path) -> dict[str, Any]:
    """An upgrade in which a process is killed. :return: its report."""
    program = [sys.executable, str(_PROGRAM), victim]
    arguments = ["upgrade", "--json", "--no-transit", name, "--emulator", str(emulator)]
    if moment in dying.CALLS:
        done = daemon.run(*program, moment, *arguments)
    else:
        _, step, order = STEPS[moment]
        hook = daemon.root / f"etc/libvirt/hooks/qemu.d/{order}-dying"
        once = f'[ "$2/$3" = {step} ] && [ ! -e {dying.STATES} ] || exit 0'
        hook.write_text(f"#!/bin/sh\n{once}\nexec {shlex.join(program)} >/dev/null\n")
        hook.chmod(0o755)
        done = daemon.sevhop(*arguments)
        hook.unlink()
    report: dict[str, Any] = json.loads(done.stdout)["domains"][0]
    return report


@pytest.mark.parametrize("moment", some_of(MOMENTS))
def test_upgrade_survives_the_death_of_one_process(
    daemon: Daemon, start: StartDomain, states: Path, old: Path, new: Path, moment: str
) -> None:
    guest = start()
    guest.wait_for_ticks()
    wanted = STEPS[moment][0] if moment in STEPS else moment.split(" ")[0]
    for victim, here, there in ((KEEPER, old, new), (SUPERVISOR, new, old)):
        report = upgrade_with(daemon, victim, moment, guest.name, there)
        assert states.read_text() == wanted
        states.unlink()
        # When a keeper dies while a destination starts, that one fails.
        may_fail = victim == KEEPER and wanted == "restoring"
        assert report["outcome"] in (("done", "rolled-back") if may_fail else ("done",)), report
        assert guest.emulator() == str(there if report["outcome"] == "done" else here)
        guest.wait_for_ticks()
        assert daemon.left_over() == []
        if report["outcome"] == "rolled-back":
            assert daemon.upgrade(guest.name, "--no-transit", "--emulator", there)["outcome"] == "done"


def test_keeper_that_dies_in_the_commit_rolls_back(
    daemon: Daemon, start: StartDomain, states: Path, old: Path, new: Path, tmp_path: Path
) -> None:
    """The hook gets no reply, and refuses: libvirt terminates the destination, and the old emulator is restored."""
    guest = start()
    guest.wait_for_ticks()
    environment = dying.after_call(tmp_path, "sevhop_qmp.adopt", "finish")
    arguments = ["upgrade", "--json", "--no-transit", guest.name, "--emulator", str(new)]
    done = daemon.run("env", environment, sys.executable, "-m", "sevhop.cli", *arguments)
    report = json.loads(done.stdout)["domains"][0]
    assert states.exists()
    assert (done.returncode, report["outcome"]) == (3, "rolled-back"), report
    assert guest.emulator() == str(old)
    guest.wait_for_ticks()
    assert daemon.left_over() == []


def suspend(daemon: Daemon, guest: DomainGuest, emulator: Path) -> str:
    """Suspend the guest in the keeper. :return: the save image."""
    guest.wait_for_ticks()
    return str(daemon.upgrade(guest.name, "--no-transit", "--emulator", emulator, "--prepare")["image"])


def finish(daemon: Daemon, guest: DomainGuest, image: str) -> None:
    """Finish the upgrade."""
    daemon.virsh("restore", image)
    guest.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0


def test_guest_survives_the_death_of_several_keepers(
    daemon: Daemon, start: StartDomain, states: Path, new: Path
) -> None:
    guest = start()
    image = suspend(daemon, guest, new)
    for _ in range(3):
        assert daemon.run(sys.executable, _PROGRAM, KEEPER).returncode == 0
    assert daemon.run(sys.executable, _PROGRAM, SUPERVISOR).returncode == 0
    assert states.read_text() == 4 * "waiting"
    finish(daemon, guest, image)


def test_guest_survives_the_death_of_destination_and_keeper(
    daemon: Daemon, start: StartDomain, states: Path, new: Path
) -> None:
    """After the commit and before the guest runs: the next keeper knows that it has the guest again."""
    guest = start()
    image = suspend(daemon, guest, new)
    hook = daemon.root / "etc/libvirt/hooks/qemu.d/zz-dying"
    program = shlex.join([sys.executable, str(_PROGRAM), KEEPER])
    hook.write_text(f'#!/bin/sh\n[ "$2/$3" = started/begin ] || exit 0\n{program}\nexit 1\n')
    hook.chmod(0o755)
    assert daemon.run("virsh", "restore", image).returncode == 1
    hook.unlink()
    assert states.read_text() == "committed"
    finish(daemon, guest, image)


def test_keeper_ignores_signals(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    image = suspend(daemon, guest, new)
    for name in ("HUP", "INT", "TERM"):
        for pid in keepers(daemon):
            daemon.run("kill", f"-{name}", str(pid))
    done = daemon.sevhop("status", "--json")
    (row,) = json.loads(done.stdout)["domains"]
    assert (done.returncode, row["place"], row["attended"]) == (4, "keeper", False)
    assert "waiting" in row["operation"]
    assert len(keepers(daemon)) == 2
    for pid in keepers(daemon):
        assert Path(f"/proc/{pid}/cwd").resolve() == Path("/")
    finish(daemon, guest, image)


def keepers(daemon: Daemon) -> list[int]:
    """Both processes."""
    return daemon.named(KEEPER, SUPERVISOR)


def test_guest_is_lost_when_both_are_killed(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """Then a guest that is nowhere else is lost; but no second copy runs, and the domain can be started again."""
    guest = start()
    image = suspend(daemon, guest, new)
    for victim in (SUPERVISOR, KEEPER):
        assert daemon.run(sys.executable, _PROGRAM, victim).returncode == 0
    refused = daemon.run("virsh", "restore", image)
    assert refused.returncode == 1
    assert "is gone, and the guest's memory with it" in refused.stderr
    assert "its keeper is gone" in daemon.sevhop("status").stdout
    daemon.virsh("start", guest.name)
    status = daemon.sevhop("status", guest.name).stdout
    assert "QEMU 7.2" in status
    assert "can hop; hop interrupted: its keeper is gone" in status
    daemon.virsh("destroy", guest.name)
    done = daemon.sevhop("recover")
    assert (done.returncode, daemon.left_over()) == (5, [])
    assert "neither a QEMU nor a keeper has its memory" in done.stdout
    daemon.virsh("start", guest.name)
    assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"
