"""Whether libvirt calls the hook is asked once for each daemon, and a check only reads what was found."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sevhop.install import verification
from sevhop.libvirt.daemon import DomainError
from sevhop_qmp.errors import SevhopError

from tests.support.guests.running import wait_until


class Daemon:
    """A connection to a daemon that calls the hook, or does not; restores are counted."""

    def __init__(self, *, calls_hook: bool = True) -> None:
        self.calls_hook = calls_hook
        self.restores = 0

    async def default_emulator(self) -> tuple[str, str]:
        return "qemu", "/usr/bin/qemu"

    async def restore(self, path: str) -> None:
        self.restores += 1
        name = Path(path).read_bytes().partition(b"<name>")[2].partition(b"</name>")[0].decode()
        why = f"sevhop: the keeper of domain {name} is gone" if self.calls_hook else "cannot read the image"
        raise DomainError(f"Hook script execution failed: {why}")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hook, installed; the daemon is this process."""
    script = tmp_path / "sevhop"
    script.touch(mode=0o755)
    monkeypatch.setattr(verification, "SCRIPT", script)
    monkeypatch.setattr(verification, "RUN", tmp_path)
    monkeypatch.setattr(verification, "RECORD", tmp_path / "hook-verified")
    monkeypatch.setattr(verification, "make_run_directories", lambda: None)
    monkeypatch.setattr(verification, "daemons", lambda: {"libvirtd": os.getpid()})
    return script


def ensure(daemon: Any) -> None:
    asyncio.run(verification.ensure_hook(daemon))


def test_hook_is_verified_once_for_a_daemon_and_a_script(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon()
    ensure(daemon)
    ensure(daemon)
    assert daemon.restores == 1
    assert verification.RECORD.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(verification, "daemons", lambda: {"libvirtd": os.getppid()})
    ensure(daemon)
    os.utime(script, ns=(1, 1))
    ensure(daemon)
    assert daemon.restores == 3


def test_hook_that_is_not_called_is_an_error_each_time(script: Path) -> None:
    daemon = Daemon(calls_hook=False)
    for count in (1, 2):
        with pytest.raises(SevhopError, match="libvirt does not call the hook"):
            ensure(daemon)
        assert daemon.restores == count
    assert not verification.is_recorded()


def test_check_believes_a_hook_that_is_installed(script: Path) -> None:
    """That it is called is verified by the upgrade, before anything is touched."""
    assert verification.reason_against() == ""


def test_check_names_a_hook_that_is_missing_or_not_executable(script: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("os.access answers for the real user")
    script.chmod(0o644)
    assert verification.reason_against() == f"{script} is not executable"
    script.unlink()
    assert verification.reason_against() == "sevhop's hook is not installed"


def test_check_changes_nothing(script: Path) -> None:
    before = sorted(script.parent.iterdir())
    verification.reason_against()
    assert sorted(script.parent.iterdir()) == before


@pytest.mark.parametrize("record", ["", "script", "\udcff"])
def test_invalid_record_does_not_verify_the_hook(script: Path, record: str) -> None:
    verification.RECORD.write_bytes(record.encode(errors="surrogateescape"))
    assert not verification.is_recorded()


@pytest.mark.parametrize("name", ["libvirtd", "virtqemud"])
def test_daemon_is_found_by_its_pid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The one of a daemon that has ended may have the pid of another process."""
    monkeypatch.setattr(verification, "_PID_FILES", tuple(tmp_path / path.name for path in verification._PID_FILES))
    for path in verification._PID_FILES:
        path.write_text(f"{os.getpid()}\n")
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / name)
    with subprocess.Popen([program, "60"]) as daemon:
        wait_until(lambda: Path(f"/proc/{daemon.pid}/comm").read_text() == f"{name}\n", 10, "the program runs")
        (tmp_path / f"{name}.pid").write_text(f"{daemon.pid}\n")
        found, called = verification.daemons(), verification.daemon_name()
        daemon.kill()
    assert (found, called) == ({name: daemon.pid}, name)


@pytest.mark.parametrize(
    ("error", "hint"), [(PermissionError, "run sevhop as root"), (FileNotFoundError, "run: sevhop install")]
)
def test_part_of_the_hook_that_cannot_be_read_is_reported_with_what_to_do(
    error: type[OSError], hint: str, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise error(1, "no", str(script))

    monkeypatch.setattr(verification, "_identity", refuse)
    with pytest.raises(SevhopError) as caught:
        ensure(Daemon())
    assert (caught.value.message, caught.value.hint) == (f"cannot read {script}, a part of the hook: no", hint)
