"""The status of a domain as text, and the state of the file that a process was started from."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sevhop.checks import status
from sevhop.checks.domain_status import DomainStatus
from sevhop.records import journal, run_directory
from sevhop.records.hop_record import HopRecord, Process
from sevhop_qmp.errors import ProcessError
from sevhop_qmp.process import OnDisk, QemuProcess

LINES = {
    "web: QEMU 7.2.22, up to date, can hop": DomainStatus("web", "7.2.22", "unchanged", "7.2.22"),
    "web: QEMU 7.2.22, 10.0.13 is installed, can hop": DomainStatus("web", "7.2.22", "unchanged", "10.0.13"),
    "web: QEMU 7.2.22 (replaced on disk), 7.2.22 is installed, can hop": DomainStatus(
        "web", "7.2.22", "replaced", "7.2.22"
    ),
    "web: QEMU 7.2.22 (deleted on disk), none is installed, cannot hop: emulator: gone": DomainStatus(
        "web", "7.2.22", "deleted", "", blocker="emulator: gone"
    ),
    "web: QEMU 7.2.22, up to date, cannot hop until it is shut down and started again: memory: private (run: it)": (
        DomainStatus(
            "web",
            "7.2.22",
            "unchanged",
            "7.2.22",
            blocker="devices: x",
            restart_required="memory: private",
            hint="run: it",
        )
    ),
    "web: QEMU 7.2.22, up to date, can hop; hop interrupted": DomainStatus(
        "web", "7.2.22", "unchanged", "7.2.22", operation="hop interrupted"
    ),
    "web: hop in progress: waiting": DomainStatus("web", operation="hop in progress: waiting"),
    "web: runs in the transit; the last attempt failed: x (run: it) (run: sevhop recover web)": DomainStatus(
        "web", operation="runs in the transit; the last attempt failed: x (run: it)", hint="run: sevhop recover web"
    ),
    "web: runs in the transit; the last attempt failed: x (then run: sevhop recover web)": DomainStatus(
        "web",
        operation="runs in the transit; the last attempt failed: x (then run: sevhop recover web)",
        hint="run: sevhop recover web",
    ),
    "web: QEMU 7.2.22, up to date, cannot hop: libvirt: no hook (run: sevhop install)": DomainStatus(
        "web", "7.2.22", "unchanged", "7.2.22", blocker="libvirt: no hook", hint="run: sevhop install"
    ),
    "web: domain web is not running": DomainStatus("web", blocker="domain web is not running"),
    "web: no QEMU": DomainStatus("web"),
}


@pytest.mark.parametrize("line", LINES)
def test_status_of_a_domain_is_one_line(line: str) -> None:
    assert str(LINES[line]) == line


def test_domain_is_outdated_if_it_can_hop_to_an_installed_qemu() -> None:
    assert {line for line, row in LINES.items() if row.outdated} == {
        line for line in LINES if line.endswith(" is installed, can hop")
    }
    for row in LINES.values():
        assert row.as_json()["outdated"] == row.outdated


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return Path(shutil.copy("/bin/sleep", tmp_path / "program"))


@pytest.fixture
def process(program: Path) -> Iterator[QemuProcess]:
    child = subprocess.Popen([program, "60"])
    process = QemuProcess.open(child.pid)
    try:
        yield process
    finally:
        process.close()
        child.kill()
        child.wait()


def test_executable_is_unchanged_at_first(process: QemuProcess) -> None:
    assert process.on_disk is OnDisk.UNCHANGED


def test_executable_is_replaced_after_a_rename(process: QemuProcess, program: Path) -> None:
    shutil.copy(program, f"{program}.new")
    os.replace(f"{program}.new", program)
    assert process.on_disk is OnDisk.REPLACED


def test_executable_is_deleted_after_unlink(process: QemuProcess, program: Path) -> None:
    program.unlink()
    assert process.on_disk is OnDisk.DELETED


def test_executable_of_an_exited_process_is_an_error(process: QemuProcess) -> None:
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessError, match="has exited"):
        assert process.on_disk


class Libvirt:
    """A daemon without active domains."""

    async def open(self, *_: object) -> Libvirt:
        """In the place of ``Connection.open``."""
        return self

    def close(self) -> None:
        """Nothing to do."""

    async def domains(self) -> list[object]:
        return []


GONE = Process(1 << 30, 1)
HOP = HopRecord("domain", "my web", "none", True, GONE, uuid="4711", phase="retire")
#: Of an interrupted hop without a keeper.
INTERRUPTED = {
    'hop not finished (phase "retire")': HOP,
    'hop not finished (phase "acquire")': replace(HOP, phase=""),
    "the host was rebooted during its hop": replace(HOP, boot="another", transit=GONE, committed=True),
    "the transit has exited, in which the guest was": replace(HOP, transit=GONE, committed=True),
    'hop not finished (phase "retire"); the last attempt failed: it hangs': replace(HOP, failure="it hangs"),
}


@pytest.mark.parametrize("text", INTERRUPTED)
@pytest.mark.parametrize("names", [[], ["my web"]])
def test_interrupted_hop_is_listed_although_libvirt_has_no_qemu_of_its_domain(
    text: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "Connection", Libvirt())
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "journal")
    monkeypatch.setattr(run_directory, "DOMAINS", tmp_path / "domains")
    journal.Journal.begin(INTERRUPTED[text]).leave()
    (row,) = asyncio.run(status.survey("qemu:///system", names))
    assert (str(row), row.attended) == (f"my web: {text} (run: sevhop recover 'my web')", False)
