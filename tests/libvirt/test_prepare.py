"""``sevhop prepare`` with a real libvirt: domains that it has prepared hop, and keep what is in their definitions."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.machine import Accelerator

from .conftest import StartDomain

#: A display with a password.
DISPLAY = "<graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1' passwd='hunter2'/>"


#: A module with which another client edits the definition when it was read, the second time: the first is for the hint
#: of a check of the running domain.
EDITED = """
import subprocess
from sevhop.libvirt.domain import Domain

original, reads = Domain.inactive_xml, []

async def inactive_xml(self, *, secure=True):
    xml = await original(self, secure=secure)
    reads.extend([self] if secure else [])
    if len(reads) == 2 and secure:
        edit = ["virsh", "desc", self.name, "--config", "--title", "edited"]
        subprocess.run(edit, check=True, stdout=subprocess.DEVNULL)
    return xml

Domain.inactive_xml = inactive_xml
"""


@pytest.fixture
def unprepared(start: StartDomain) -> Iterator[DomainGuest]:
    """A domain whose memory is private to its QEMU."""
    guest = start(name="unprepared", memory="private", more=DISPLAY)
    guest.wait_for_ticks()
    yield guest


def prepared(daemon: Daemon, *words: str | Path) -> dict[str, Any]:
    """Prepare one domain; what is reported of it."""
    done = daemon.sevhop("prepare", "--json", *words)
    assert done.returncode == 0, done
    (row,) = json.loads(done.stdout)["domains"]
    assert isinstance(row, dict)
    return row


def status_of(daemon: Daemon, name: str) -> dict[str, Any]:
    """Its row in ``sevhop status``."""
    done = daemon.sevhop("status", "--json", name)
    (row,) = json.loads(done.stdout)["domains"]
    assert isinstance(row, dict)
    return row


def start_again(guest: DomainGuest) -> None:
    """Shut it down, and start it with its definition."""
    guest.daemon.virsh("destroy", guest.name)
    guest.file("log").unlink()
    guest.daemon.virsh("start", guest.name)
    guest.wait_for_ticks()


def without_backing(xml: str) -> str:
    """A definition without what was added, in one form."""
    domain = ElementTree.fromstring(xml)
    for backing in domain.findall("memoryBacking"):
        domain.remove(backing)
    return ElementTree.canonicalize(ElementTree.tostring(domain), strip_text=True)


def test_newcomer_upgrades_one_domain_and_learns_what_the_other_needs(
    daemon: Daemon, start: StartDomain, unprepared: DomainGuest, new: Path
) -> None:
    """In three commands, each with --json."""
    ready = start(name="ready")
    ready.wait_for_ticks()

    done = daemon.sevhop("status", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)["domains"]}
    assert done.returncode == 0
    assert (rows["ready"]["blocker"], rows["ready"]["restart_required"], rows["ready"]["hint"]) == ("", "", "")
    assert rows["unprepared"]["restart_required"].startswith("memory: pc.ram is private to its QEMU")
    assert "sevhop prepare unprepared" in rows["unprepared"]["hint"]

    done = daemon.sevhop("upgrade", "--json", "--emulator", new, "--all")
    reports = {row["guest"]: row for row in json.loads(done.stdout)["domains"]}
    assert done.returncode == 1
    assert (reports["ready"]["outcome"], reports["unprepared"]["outcome"]) == ("done", "refused")
    assert "run: sevhop prepare unprepared; then shut the domain down and start it" in reports["unprepared"]["reason"]

    done = daemon.sevhop("prepare", "--json", "unprepared")
    (row,) = json.loads(done.stdout)["domains"]
    assert done.returncode == 0
    assert (row["outcome"], row["active"]) == ("done", True)
    assert row["restart_required"] == rows["unprepared"]["restart_required"]
    assert row["hint"] == "virsh shutdown unprepared, and when it is off virsh start unprepared"

    # Both run, and that was all.
    ready.wait_for_ticks()
    unprepared.wait_for_ticks()
    start_again(unprepared)
    assert daemon.upgrade("unprepared", "--emulator", new)["outcome"] == "done"


def test_prepared_domain_passes_the_check_when_it_is_started_again(
    daemon: Daemon, unprepared: DomainGuest, new: Path
) -> None:
    name, pid = unprepared.name, unprepared.pid
    before = unprepared.xml("--inactive", "--security-info")
    live = unprepared.xml("--security-info")
    assert "hunter2" in before

    assert prepared(daemon, "--dry-run", name)["outcome"] == "checked"
    assert unprepared.xml("--inactive", "--security-info") == before
    row = prepared(daemon, name)
    assert "hunter2" not in json.dumps(row)
    after = unprepared.xml("--inactive", "--security-info")
    assert without_backing(after) == without_backing(before)
    assert "hunter2" in after
    # The diff is what has become of it, but for the password.
    added = [line[1:] for line in row["diff"].splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert [line for line in after.splitlines() if line not in before.splitlines()] == added
    assert "hunter2" not in row["diff"]
    # The running domain is as it was.
    assert (unprepared.pid, unprepared.xml("--security-info")) == (pid, live)
    unprepared.wait_for_ticks()
    assert prepared(daemon, name)["outcome"] == "unchanged"
    assert unprepared.xml("--inactive", "--security-info") == after
    status = status_of(daemon, name)
    assert status["restart_required"]
    assert status["hint"] == "shut the domain down and start it: its definition is prepared"
    done = daemon.sevhop("check", name)
    assert done.returncode == 1
    assert "FAIL memory" in done.stdout

    start_again(unprepared)
    done = daemon.sevhop("check", name, "--emulator", new)
    assert done.returncode == 0, done.stdout
    assert (status_of(daemon, name)["blocker"], prepared(daemon, name)["restart_required"]) == ("", "")
    assert daemon.upgrade(name, "--emulator", new)["outcome"] == "done"
    unprepared.wait_for_ticks()
    assert prepared(daemon, name)["outcome"] == "unchanged"


@pytest.mark.parametrize(
    "elements",
    [
        "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>",
        "<memoryBacking><source type='anonymous'/><allocation mode='immediate'/></memoryBacking>",
        "<memoryBacking><nosharepages/><discard/></memoryBacking>",
    ],
)
def test_domain_with_other_memory_is_prepared(daemon: Daemon, start: StartDomain, new: Path, elements: str) -> None:
    guest = start(memory="private", elements=elements)
    guest.wait_for_ticks()
    assert prepared(daemon, guest.name)["outcome"] == "done"
    start_again(guest)
    assert prepared(daemon, guest.name)["outcome"] == "unchanged"
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"


def test_domain_with_private_numa_cells_is_prepared(daemon: Daemon, start: StartDomain, new: Path) -> None:
    cells = "<cell id='0' cpus='0' memory='32' unit='MiB' memAccess='private'/>"
    cells += "<cell id='1' cpus='1' memory='32' unit='MiB'/>"
    cpu = f"<cpu mode='custom' match='exact' check='none'><model>qemu64</model><numa>{cells}</numa></cpu>"
    guest = start(memory="private", cpu=cpu, vcpus=2)
    guest.wait_for_ticks()
    assert prepared(daemon, guest.name)["outcome"] == "done"
    start_again(guest)
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"


def test_edit_at_the_same_time_is_not_lost(daemon: Daemon, unprepared: DomainGuest, tmp_path: Path) -> None:
    """It comes after the definition was read, and before it is replaced."""
    (tmp_path / "sitecustomize.py").write_text(EDITED)
    done = daemon.run(
        "env", f"PYTHONPATH={tmp_path}", sys.executable, "-m", "sevhop.cli", "prepare", "--json", unprepared.name
    )
    (row,) = json.loads(done.stdout)["domains"]
    assert row["outcome"] == "done", done
    xml = unprepared.xml("--inactive", "--security-info")
    assert "<title>edited</title>" in xml
    assert "<source type='memfd'/>" in xml
    assert "hunter2" in xml


def test_libvirt_knows_what_an_alias_is(daemon: Daemon, old: Path, new: Path, accelerator: Accelerator) -> None:
    """It replaces one itself when a domain is defined, unless the emulator was missing then."""
    kind = "kvm" if accelerator == "kvm" else "qemu"
    arguments = [
        (str(emulator), "x86_64", machine, kind) for emulator in (old, new) for machine in ("q35", "pc-q35-7.2")
    ]
    program = f"""
import asyncio
from sevhop.libvirt.connection import Connection

async def main():
    connection = await Connection.open()
    print(*[await connection.machine_type(*one) for one in {arguments!r}])
    connection.close()

asyncio.run(main())
"""
    done = daemon.run(sys.executable, "-c", program)
    assert done.stdout.split() == ["pc-q35-7.2", "pc-q35-7.2", "pc-q35-10.0", "pc-q35-7.2"], done


def test_all_is_for_those_that_are_off_as_well(daemon: Daemon, start: StartDomain) -> None:
    guest = start(memory="private")
    daemon.virsh("destroy", guest.name)
    metadata = ("metadata", guest.name, "--config", "--uri", "urn:sevhop:domain")
    daemon.virsh(*metadata, "--key", "sevhop", "--set", "<leave-alone/>")
    done = daemon.sevhop("prepare", "--all", "--json")
    assert json.loads(done.stdout) == {"domains": [], "excluded": [guest.name]}
    daemon.virsh(*metadata, "--remove")
    row = prepared(daemon, "--all")
    assert (row["domain"], row["outcome"], row["active"], row["restart_required"]) == (guest.name, "done", False, "")
