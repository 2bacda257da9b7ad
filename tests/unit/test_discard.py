"""Giving up the guest of an interrupted hop: what is refused, what would be lost, and what is left then: nothing."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sevhop.engine import discard
from sevhop.engine.recovery_result import RecoveryOutcome
from sevhop.errors import Refused
from sevhop.keeper.listeners import listening_at
from sevhop.records import journal, run_directory
from sevhop.records.hop_record import HopRecord, Process
from sevhop.records.journal import Journal
from sevhop_qmp.process import QemuProcess

from .given_up import RECORD, UUID, Libvirt, libvirt

__all__ = ["libvirt"]  # the fixture


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that lives until it is killed."""
    with subprocess.Popen(["sleep", "1000"]) as made:
        try:
            yield made
        finally:
            made.kill()


def identity(process: subprocess.Popen[bytes]) -> Process:
    """As a journal has it."""
    opened = QemuProcess.open(process.pid)
    try:
        return Process.of(opened)
    finally:
        opened.close()


def interrupted(record: HopRecord) -> None:
    """Its command was killed."""
    Journal.begin(record).leave()


def given_up() -> RecoveryOutcome:
    """... by somebody who agrees to what is lost."""

    async def work() -> RecoveryOutcome:
        return (await discard.discard(await discard.assess("web1", timeout=2.0), timeout=2.0)).result

    return asyncio.run(work())


def refusal(name: str = "web1") -> str:
    """Why it is refused."""
    with pytest.raises(Refused) as caught:
        asyncio.run(discard.assess(name, timeout=0.2))
    return caught.value.message


def test_guest_in_the_transit_is_ended_and_nothing_is_left(
    libvirt: Libvirt, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    directory = tmp_path / "transit"
    directory.mkdir()
    record = replace(RECORD, transit=identity(process), transit_directory=str(directory), committed=True)
    interrupted(record)
    claimed = run_directory.claim("web1", UUID)
    loss = asyncio.run(discard.assess(UUID, timeout=2.0))
    assert loss.state == "transit"
    assert f"process {process.pid}" in loss.text
    assert process.poll() is None
    assert given_up() is RecoveryOutcome.DISCARDED
    assert process.wait(10) == -9
    assert not directory.exists()
    assert not claimed.exists()
    assert list(journal.journals()) == []
    assert list(run_directory.DOMAINS.iterdir()) == []


def test_old_qemu_that_the_guest_has_left_is_ended_with_the_transit(
    libvirt: Libvirt, process: subprocess.Popen[bytes]
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as source:
        interrupted(replace(RECORD, source=identity(source), transit=identity(process), committed=True))
        assert given_up() is RecoveryOutcome.DISCARDED
        assert (source.wait(10), process.wait(10)) == (-9, -9)


@pytest.mark.parametrize("transit", [None, "not committed"])
def test_old_qemu_that_may_have_the_guest_is_left_alone(
    libvirt: Libvirt, process: subprocess.Popen[bytes], transit: str | None
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            there = None if transit is None else identity(other)
            interrupted(replace(RECORD, source=identity(process), transit=there))
            assert f"its old QEMU (process {process.pid}) is there" in refusal()
            assert (process.poll(), other.poll()) == (None, None)
        finally:
            other.kill()


def test_guest_that_libvirt_has_is_left_alone(libvirt: Libvirt, process: subprocess.Popen[bytes]) -> None:
    interrupted(replace(RECORD, transit=identity(process), committed=True))
    libvirt.has_qemu = True
    assert "libvirt has a QEMU of domain web1" in refusal()
    libvirt.answers = False
    assert "whether libvirt has the guest is not known" in refusal()
    assert process.poll() is None


def test_hop_in_progress_is_left_alone(libvirt: Libvirt) -> None:
    mine = Journal.begin(RECORD)
    try:
        assert "is hopping web1, or recovers it" in refusal()
    finally:
        mine.leave()


def test_only_domains_with_a_hop_can_be_given_up(libvirt: Libvirt) -> None:
    interrupted(replace(RECORD, kind="standalone", guest="/run/qmp"))
    assert refusal("/run/qmp") == "/run/qmp is no domain"
    assert refusal("web2") == "no hop of web2 was interrupted"


def test_guest_that_has_moved_meanwhile_is_left_alone(libvirt: Libvirt, process: subprocess.Popen[bytes]) -> None:
    """What somebody has agreed to is not lost any more, or something else is."""
    interrupted(RECORD)
    loss = asyncio.run(discard.assess("web1", timeout=2.0))
    assert loss.state == "nowhere"
    mine = Journal.take_over(next(journal.journals()))
    mine.write({"transit": identity(process), "committed": True})
    mine.leave()
    with pytest.raises(Refused, match="the guest is not where it was any more"):
        asyncio.run(discard.discard(loss, timeout=2.0))
    assert process.poll() is None
    assert list(journal.journals())


def test_remains_of_a_hop_before_a_reboot_are_removed(libvirt: Libvirt, process: subprocess.Popen[bytes]) -> None:
    """Its pids may be those of other processes now."""
    interrupted(replace(RECORD, boot="another", transit=identity(process), committed=True))
    assert asyncio.run(discard.assess("web1", timeout=0.2)).state == "nowhere"
    assert given_up() is RecoveryOutcome.DISCARDED
    assert process.poll() is None
    assert list(journal.journals()) == []


def test_keeper_that_does_not_reply_is_killed(libvirt: Libvirt) -> None:
    directory = run_directory.claim("web1", UUID)
    interrupted(replace(RECORD, directory=str(directory)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / "control"))
        listener.listen()
        with subprocess.Popen(["sleep", "1000"], pass_fds=[listener.fileno()]) as keeper:
            # The test listens as well, and is not found: nobody kills himself.
            (found,) = listening_at(directory / "control")
            assert found.pid == keeper.pid
            found.close()
            loss = asyncio.run(discard.assess("web1", timeout=0.2))
            assert loss.state == "hanging-keeper"
            assert asyncio.run(discard.discard(loss, timeout=2.0)).result is RecoveryOutcome.DISCARDED
            assert keeper.wait(10) == -9
    assert not directory.exists()
