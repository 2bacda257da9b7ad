"""What ``sevhop status`` reports of domains whose hop waits for somebody."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sevhop.checks import status
from sevhop.checks.domain_status import DomainStatus, Place
from sevhop.cli.main import main
from sevhop.keeper.client import KeeperClient
from sevhop.keeper.paths import KeeperPaths
from sevhop.keeper.transit_state import RESTORE_ENDED
from sevhop.libvirt.connection import Connection
from sevhop.process import systemd
from sevhop.records import journal, run_directory
from sevhop.records.hop_record import HopRecord, Process
from sevhop.records.journal import Journal
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

UUID = "0c9d2f5e-0000-4000-8000-000000000001"
OUTSIDE = HopRecord(kind="standalone", guest="vm", context="none", running=True, source=Process(1 << 22, 1))


@dataclass
class FakeDomain:
    """One that libvirt knows, and that cannot be examined."""

    name: str = "web"


@dataclass
class FakeLibvirt:
    active: list[FakeDomain] = field(default_factory=list)

    async def domains(self) -> list[FakeDomain]:
        return self.active

    async def look_up(self, name: str) -> FakeDomain:
        return next(domain for domain in self.active if domain.name == name)

    def close(self) -> None:
        """Nothing is open."""


class FakeKeeper:
    """One whose last restore has failed."""

    reason = RESTORE_ENDED
    state = "transit"
    transit = 4711

    async def status(self) -> dict[str, Any]:
        found = {"transit": self.transit, "transit_version": "10.0.13", "state": self.state, "reason": self.reason}
        return found | {"image": "/image"}

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLibvirt:
    """The daemon; no hop is there yet."""
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "journal")
    monkeypatch.setattr(run_directory, "RUN", tmp_path / "run")
    monkeypatch.setattr(run_directory, "DOMAINS", tmp_path / "run" / "domains")
    libvirt = FakeLibvirt()

    async def connect(uri: str) -> FakeLibvirt:
        return libvirt

    def examine(*_: object) -> None:
        raise SevhopError("not examined here")

    monkeypatch.setattr(Connection, "open", connect)
    monkeypatch.setattr(status, "examine", examine)
    return libvirt


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> FakeKeeper:
    """Of the guest in the transit."""
    keeper = FakeKeeper()

    async def connect(directory: Path) -> FakeKeeper:
        return keeper

    monkeypatch.setattr(KeeperClient, "connect", connect)
    return keeper


def left_behind(**fields: Any) -> None:
    """A hop whose command is not at work any more."""
    record = HopRecord(
        kind="domain", guest="web", uuid=UUID, context="none", running=True, source=Process(1 << 22, 1), new="/q"
    )
    mine = Journal.begin(record)
    mine.write(fields)
    mine.leave()


def in_transit(**fields: Any) -> Path:
    """The same, with its guest in a transit; the path of its save image."""
    process = QemuProcess.open(os.getpid())
    left_behind(committed=True, transit=Process.of(process), **fields)
    process.close()
    image = KeeperPaths(run_directory.claim("web", UUID)).image
    image.touch()
    return image


def row() -> DomainStatus:
    (one,) = asyncio.run(status.survey("qemu:///system", []))
    return one


def test_guest_in_the_transit_has_both_ways_to_finish_as_hint(libvirt: FakeLibvirt, keeper: FakeKeeper) -> None:
    """By name: a prepared upgrade is left alone by ``sevhop recover`` otherwise."""
    image = in_transit(phase="prepared")
    found = row()
    assert found.hint == f"run: sevhop recover web, or virsh restore {image}"
    assert (found.place, found.attended) == (Place.TRANSIT, False)
    assert str(found) == (
        f"web: the guest runs in the transit (QEMU 10.0.13, process 4711); the last restore failed: {RESTORE_ENDED}"
        f" ({found.hint})"
    )


def test_failure_of_the_upgrade_is_reported_instead_of_the_keepers(libvirt: FakeLibvirt, keeper: FakeKeeper) -> None:
    """It has ended the restore: the keeper does not know why."""
    in_transit(phase="restore", failure="the hook x has refused it")
    assert row().operation.endswith("process 4711); the last attempt failed: the hook x has refused it")


def test_failure_of_a_later_restore_is_reported_with_that_of_the_upgrade(
    libvirt: FakeLibvirt, keeper: FakeKeeper
) -> None:
    in_transit(phase="restore", failure="first")
    keeper.reason = "second"
    assert "; the last restore failed: second; the last attempt failed: first" in row().operation


@pytest.mark.parametrize(
    ("phase", "timer", "tried"), [("restore", True, True), ("prepared", True, False), ("restore", False, False)]
)
def test_next_attempt_is_reported_if_there_will_be_one(
    libvirt: FakeLibvirt, keeper: FakeKeeper, monkeypatch: pytest.MonkeyPatch, phase: str, timer: bool, tried: bool
) -> None:
    monkeypatch.setattr(systemd, "manages_host", lambda: timer)
    in_transit(phase=phase, failure="first", failures=1)
    assert ("tried again after" in row().operation) == tried


def test_state_of_the_keeper_is_reported_if_it_is_restoring(libvirt: FakeLibvirt, keeper: FakeKeeper) -> None:
    in_transit(phase="restore")
    keeper.state = "restoring"
    assert "process 4711): restoring" in row().operation


def test_guest_in_the_transit_without_a_keeper_has_the_hint(libvirt: FakeLibvirt) -> None:
    in_transit(phase="restore")
    found = row()
    assert found.operation == f"the guest runs in the transit (process {os.getpid()}), without a keeper"
    assert found.hint.startswith("run: sevhop recover web")


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ("restoring", "the guest is suspended in the keeper: restoring"),
        ("waiting", "the guest is suspended in the keeper: waiting"),
        ("held", "hop in progress: held"),
    ],
)
def test_suspended_guest_is_not_called_a_hop_in_progress(
    libvirt: FakeLibvirt, keeper: FakeKeeper, state: str, text: str
) -> None:
    """Nobody is at work on it: it waits, also after a restore that has failed."""
    left_behind(phase="restore")
    run_directory.claim("web", UUID)
    keeper.state, keeper.transit = state, 0
    assert row().operation == f"{text}, image /image"


def test_reason_of_an_upgrade_is_not_reported_when_its_guest_is_there(
    libvirt: FakeLibvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client has restored it since."""

    async def examined(*_: object) -> DomainStatus:
        return DomainStatus("web", "10.0.13", "unchanged", "10.0.13")

    monkeypatch.setattr(status, "_status", examined)
    left_behind(phase="restore", transit=Process(1 << 22, 1), committed=True, failure="x", failures=1)
    libvirt.active = [FakeDomain()]
    assert row().operation == 'hop not finished (phase "restore")'


def test_journal_that_is_left_is_reported_with_what_to_do(libvirt: FakeLibvirt) -> None:
    """After virsh restore the guest is libvirt's, and the next upgrade is refused until the journal is removed."""
    left_behind(phase="prepared")
    libvirt.active = [FakeDomain()]
    found = row()
    assert (found.operation, found.hint) == ('hop not finished (phase "prepared")', "run: sevhop recover web")
    assert (found.place, found.attended) == (Place.DOMAIN, False)


def test_status_without_domains_is_a_line(libvirt: FakeLibvirt, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "no domain is active\n"
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"domains": []}


def test_interrupted_hop_outside_libvirt_is_listed(libvirt: FakeLibvirt, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever runs status after a night of hops looks for what was left undone, with or without libvirt."""
    mine = Journal.begin(OUTSIDE)
    assert (row().operation, row().hint, row().place, row().attended) == ("hop in progress", "", Place.OUTSIDE, True)
    mine.write({"phase": "prepare"})
    mine.leave()
    line = 'vm: hop not finished (phase "prepare") (run: sevhop recover vm)\n'
    for names in ([], ["vm"]):
        assert main(["status", *names]) == 4
        assert capsys.readouterr().out == line
    assert main(["status", "--json"]) == 4
    (found,) = json.loads(capsys.readouterr().out)["domains"]
    assert (found["place"], found["hint"]) == ("outside", "run: sevhop recover vm")


def test_domain_and_guest_outside_libvirt_of_the_same_name_are_listed(libvirt: FakeLibvirt) -> None:
    Journal.begin(dataclasses.replace(OUTSIDE, guest="web")).leave()
    libvirt.active = [FakeDomain()]
    rows = asyncio.run(status.survey("qemu:///system", ["web"]))
    assert [(one.place, one.attended) for one in rows] == [(Place.DOMAIN, True), (Place.OUTSIDE, False)]


def test_hop_of_a_command_that_is_at_work_has_no_hint(libvirt: FakeLibvirt) -> None:
    record = HopRecord(kind="domain", guest="web", uuid=UUID, context="none", running=True, source=Process(1, 1))
    mine = Journal.begin(record)
    libvirt.active = [FakeDomain()]
    found = row()
    assert (found.operation, found.hint, found.attended) == ("", "", True)
    mine.end()
