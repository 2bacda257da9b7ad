"""The program of an old QEMU: where it is kept, what is copied, and when it is removed."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine import way_back
from sevhop.guest import kept_emulator, kept_path
from sevhop.records import journal
from sevhop.records.hop_record import HopRecord, Process
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import OnDisk, QemuProcess

PATH = "/usr/bin/qemu-system-x86_64"
UUID = "11111111-2222-3333-4444-555555555501"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root keeps programs")


@contextmanager
def running(program: Path | str) -> Iterator[QemuProcess]:
    """A process that runs a program which can sleep."""
    with subprocess.Popen([program, "600"]) as child:
        process = QemuProcess.open(child.pid)
        try:
            yield process
        finally:
            process.close()
            child.kill()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return Path(shutil.copy("/bin/sleep", tmp_path))


def made(path: str) -> Path:
    """Something in the place of a kept program."""
    file = Path(path)
    file.parent.mkdir(parents=True)
    file.touch()
    return file


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not kept_emulator.DIRECTORY.exists()


def test_original_is_in_the_path_of_what_is_kept() -> None:
    kept = kept_path.place(UUID, PATH)
    assert kept_path.original(kept) == kept_path.original(PATH) == PATH
    assert kept != kept_path.place(UUID, PATH)
    # What is kept of a guest that was rolled back has the same original.
    assert kept_path.original(kept_path.place(UUID, kept)) == PATH


@pytest.mark.parametrize(
    "path", [PATH, f"{kept_path.DIRECTORY}/x.y/emulator/q", f"{kept_path.DIRECTORY}/../emulator/q"]
)
def test_path_that_was_not_made_here_is_its_own_original(path: str) -> None:
    assert kept_path.original(path) == path
    assert kept_path.directory(path) == ""


def test_state_of_the_file_is_that_of_the_original(program: Path) -> None:
    with running(program) as process:
        assert kept_emulator.on_disk(process, str(program)) is OnDisk.UNCHANGED
        kept = kept_path.place(UUID, str(program))
        assert kept_emulator.on_disk(process, kept) is OnDisk.REPLACED
        program.unlink()
        assert kept_emulator.on_disk(process, kept) is OnDisk.DELETED


@pytest.mark.parametrize(
    ("mode", "owner", "reason"),
    [(0o757, 0, "everybody may write to its file"), (0o755, 65534, "its file belongs to user nobody")],
)
def test_program_that_others_could_write_is_not_kept(program: Path, mode: int, owner: int, reason: str) -> None:
    """A QEMU that its guest has taken over may run anything; it must not become a program that root starts."""
    program.chmod(mode)
    os.chown(program, owner, -1)
    with running(program) as process, pytest.raises(SevhopError, match=reason):
        kept_emulator.keep(process, kept_path.place(UUID, PATH))


def test_program_that_is_no_qemu_is_not_kept(program: Path) -> None:
    with running(program) as process, pytest.raises(SevhopError, match="its program does not start any more"):
        kept_emulator.keep(process, kept_path.place(UUID, PATH))


def test_program_is_not_kept_on_a_full_disk(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with running(program) as process, pytest.raises(SevhopError, match=r"cannot keep its program in .*: No space left"):
        kept_emulator.keep(process, kept_path.place(UUID, PATH))


class Domain:
    """
    :ivar texts: its XML; without one the daemon does not answer.
    """

    def __init__(self, *texts: str, uuid: str = "", active: bool = True) -> None:
        self.texts = texts
        self.uuid = uuid
        self._active = active

    async def descriptions(self) -> list[str]:
        if not self.texts:
            raise SevhopError("the daemon is gone")
        return list(self.texts)

    async def active(self) -> bool:
        return self._active


class Connection:
    """To a daemon."""

    def __init__(self, *domains: Domain) -> None:
        self.domains = domains

    async def all_domains(self) -> tuple[Domain, ...]:
        return self.domains


def forget_unused(*domains: Domain, finished: str = "") -> None:
    connection: Any = Connection(*domains)
    asyncio.run(way_back.forget_unused(connection, finished))


def test_program_that_nothing_names_is_removed() -> None:
    needed, other = (made(kept_path.place(UUID, PATH)) for _ in range(2))
    forget_unused(Domain("<domain/>"), Domain("<domain/>", f"<domain><emulator>{needed}</emulator></domain>"))
    assert (needed.exists(), other.exists()) == (True, False)
    forget_unused()


def test_program_stays_if_the_daemon_does_not_answer() -> None:
    kept = made(kept_path.place(UUID, PATH))
    forget_unused(Domain())
    assert kept.exists()
    forget_unused()


def test_program_stays_while_its_domain_is_off() -> None:
    """Its guest may have been saved to a file."""
    kept = made(kept_path.place(UUID.upper(), PATH))
    forget_unused(Domain("<domain/>", uuid=UUID, active=False))
    assert kept.exists()
    forget_unused(Domain("<domain/>", uuid=UUID), Domain("<domain/>", uuid="other", active=False))
    assert not kept.exists()


@pytest.mark.parametrize("field", ["kept", "old"])
def test_program_of_a_hop_in_progress_stays(field: str) -> None:
    kept = made(kept_path.place(UUID, PATH))
    record = HopRecord(
        kind="domain", guest="web1", context="none", running=True, source=Process(1 << 30, 1), uuid="uuid"
    )
    log = journal.Journal.begin(record)
    log.write({field: str(kept)})
    forget_unused()
    assert kept.exists()
    forget_unused(finished="other")
    assert kept.exists()
    forget_unused(finished="uuid")
    assert not kept.exists()
    log.end()


def test_program_stays_while_a_process_runs_it() -> None:
    kept = made(kept_path.place(UUID, PATH))
    shutil.copy("/bin/sleep", kept)
    with running(kept):
        forget_unused()
        assert kept.exists()
    forget_unused()
