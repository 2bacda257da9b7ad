"""A hop whose journal cannot be read is given up by what is found of it otherwise; a guest that is elsewhere stays."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sevhop.engine import damaged_hop, discard, recovery, recovery_names
from sevhop.engine.recovery_result import RecoveredGuest, RecoveryOutcome
from sevhop.errors import Refused
from sevhop.records import journal, run_directory
from sevhop.records.hop_record import VERSION, Process
from sevhop.records.journal import JournalError
from sevhop_qmp.process import QemuProcess

from .given_up import RECORD, UUID, Libvirt, libvirt

__all__ = ["libvirt"]  # the fixture

JOURNAL = f"domain-{UUID}.journal"
#: A program that does nothing; what follows are the arguments that a QEMU would have.
IDLE = (sys.executable, "-c", "import time; print(flush=True); time.sleep(1000)", "-uuid")
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that looks like the QEMU of a domain."""
    with contextlib.ExitStack() as stack:

        def one(uuid: str = UUID, listening: socket.socket | None = None) -> subprocess.Popen[bytes]:
            fds = [] if listening is None else [listening.fileno()]
            made = stack.enter_context(subprocess.Popen([*IDLE, uuid], pass_fds=fds, stdout=subprocess.PIPE))
            stack.callback(made.kill)
            assert made.stdout is not None
            made.stdout.readline()  # its arguments are in /proc by then
            return made

        yield one


@pytest.fixture
def transit(libvirt: Libvirt, start: Start) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU that listens where a transit does."""
    directory = run_directory.make()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "monitor"))
        listener.listen()
        made = start(listening=listener)
    yield made


def damaged(name: str = JOURNAL, content: bytes = b"{}\n") -> Path:
    """A journal that cannot be read."""
    journal.DIRECTORY.mkdir(parents=True, exist_ok=True)
    path = journal.DIRECTORY / name
    path.write_bytes(content)
    return path


def given_up(name: str = JOURNAL) -> RecoveredGuest:
    """... by somebody who agrees to what is lost."""

    async def work() -> RecoveredGuest:
        return await discard.discard(await discard.assess(name, timeout=2.0), timeout=2.0)

    done = asyncio.run(work())
    assert done.result is RecoveryOutcome.DISCARDED
    assert list(journal.journals()) == []
    return done


def refusal(name: str = JOURNAL) -> str:
    """Why it is refused; nothing is touched then."""
    with pytest.raises(Refused) as caught:
        asyncio.run(discard.assess(name, timeout=0.2))
    assert list(journal.journals())
    return caught.value.message


@pytest.mark.parametrize("content", [b"", b"{}\n", f'{{"version": {VERSION + 1}}}\n'.encode(), bytes(100)])
def test_remains_of_a_hop_are_removed(libvirt: Libvirt, content: bytes) -> None:
    """Damaged, or of another version; nobody has the guest."""
    damaged(content=content)
    left = run_directory.claim("web1", UUID)
    loss = asyncio.run(discard.assess(JOURNAL, timeout=0.2))
    assert (loss.guest, loss.state, loss.has_guest) == (JOURNAL, "nowhere", False)
    assert given_up().detail == "libvirt may start the domain from its disks"
    assert not left.exists()
    assert run_directory.hops_in_progress() == []


def test_guest_in_the_transit_is_ended(libvirt: Libvirt, transit: subprocess.Popen[bytes]) -> None:
    """It is found without the journal; a QEMU of another domain is not touched."""
    damaged()
    loss = asyncio.run(discard.assess(JOURNAL, timeout=2.0))
    assert (loss.state, f"process {transit.pid}" in loss.text) == ("transit", True)
    assert transit.poll() is None
    given_up()
    assert transit.wait(10) == -9
    assert list(run_directory.RUN.iterdir()) == []


def test_qemu_of_another_domain_is_not_touched(libvirt: Libvirt, start: Start) -> None:
    other = start("11111111-2222-3333-4444-555555555555")
    damaged()
    given_up()
    assert other.poll() is None


def test_guest_in_libvirts_qemu_stays_there(libvirt: Libvirt, start: Start) -> None:
    """There is no other QEMU, so it cannot be elsewhere: only its hop is given up."""
    qemu = start()
    damaged()
    libvirt.has_qemu = True
    loss = asyncio.run(discard.assess(JOURNAL, timeout=2.0))
    assert (loss.state, loss.has_guest, f"process {qemu.pid}" in loss.text) == ("domain", False, True)
    assert given_up().detail == "only its hop: the guest stays in libvirt's QEMU"
    assert qemu.poll() is None


def test_guest_that_may_be_in_two_qemus_is_left_alone(
    libvirt: Libvirt, start: Start, transit: subprocess.Popen[bytes]
) -> None:
    qemu = start()
    damaged()
    libvirt.has_qemu = True
    reason = refusal()
    assert f"process {qemu.pid}; process {transit.pid}, the transit" in reason
    assert (qemu.poll(), transit.poll()) == (None, None)


def test_qemu_that_libvirt_has_lost_is_left_alone(libvirt: Libvirt, start: Start) -> None:
    qemu = start()
    damaged()
    assert f"process {qemu.pid} is a QEMU of the domain, which libvirt does not have" in refusal()
    libvirt.answers = False
    assert "whether libvirt has the guest is not known" in refusal()
    assert qemu.poll() is None


def test_guest_outside_libvirt_is_not_touched(libvirt: Libvirt, start: Start) -> None:
    qemu = start()
    opened = QemuProcess.open(qemu.pid)
    name = f"process-{qemu.pid}-{opened.start_time}.journal"
    opened.close()
    damaged(name)
    loss = asyncio.run(discard.assess(name, timeout=0.2))
    assert (loss.state, f"the old one (process {qemu.pid})" in loss.text) == ("outside", True)
    assert given_up(name).detail == "only its hop: no QEMU was touched"
    assert qemu.poll() is None


@pytest.mark.parametrize(
    "name", ["domain-x.journal", "process-0-1.journal", "process-1-.journal", ".journal", "a\nb.journal"]
)
def test_journal_with_a_foreign_name_is_removed(libvirt: Libvirt, name: str) -> None:
    damaged(name)
    assert given_up(name).detail == "only its hop: no QEMU was touched"


def test_journal_that_is_in_use_is_left_alone(libvirt: Libvirt) -> None:
    mine = journal.Journal.begin(RECORD)
    try:
        mine.path.write_bytes(b"{}\n")
        assert f"another process is hopping {JOURNAL}, or recovers it" in refusal()
    finally:
        mine.leave()


def test_journal_that_can_be_read_is_not_taken_for_damaged(libvirt: Libvirt) -> None:
    mine = journal.Journal.begin(RECORD)
    mine.leave()
    assert asyncio.run(damaged_hop.find(mine.path.name)) is None
    with pytest.raises(JournalError, match="can be read"):
        journal.Journal.take_over_unreadable(mine.path, RECORD)


def test_guest_has_the_names_of_its_domain(libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a link, or libvirt, says which that is."""
    path = damaged()
    monkeypatch.setattr(damaged_hop, "_uuid_of_domain", lambda name: _async(UUID if name == "known" else ""))
    run_directory.claim("web1", UUID)
    for name in (JOURNAL, UUID, UUID.upper(), "web1", "known"):
        assert asyncio.run(damaged_hop.find(name)) == path
    for name in ("web2", "domain-x.journal", "/run/qmp", ""):
        assert asyncio.run(damaged_hop.find(name)) is None


async def _async(value: str) -> str:
    return value


@pytest.mark.parametrize("name", [JOURNAL, UUID])
def test_recovery_of_a_named_guest_reports_its_damaged_journal(libvirt: Libvirt, name: str) -> None:
    damaged()
    names = asyncio.run(recovery_names.resolve([name]))
    (found,) = asyncio.run(recovery.recover(names))
    assert (found.guest, found.result) == (JOURNAL, RecoveryOutcome.MANUAL)
    assert f"sevhop recover {JOURNAL} --discard" in found.detail
    with pytest.raises(JournalError):
        asyncio.run(recovery_names.resolve([name], emulator="/usr/bin/qemu"))


def test_identity_of_no_process_is_that_of_none() -> None:
    """A pid of the journal's own format, which no kernel gives."""
    record = damaged_hop.examine(Path("/nowhere/domain-x.journal")).record
    assert isinstance(record.source, Process)
    assert not record.source.exists
