"""What is installed on the host is not removed while a hop needs it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sevhop.cli.main import main
from sevhop.install import host as installation
from sevhop.install import verification
from sevhop.records import journal, reboot_mark
from sevhop_qmp.errors import SevhopError

from .keeper_config import UUID
from .marks import redirect_marks


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with nothing but the hook."""
    script = tmp_path / "qemu.d" / "sevhop"
    script.parent.mkdir()
    script.touch()
    monkeypatch.setattr(installation, "SCRIPT", script)
    monkeypatch.setattr(verification, "RECORD", tmp_path / "hook-verified")
    monkeypatch.setattr(installation, "DOMAINS", tmp_path / "domains")
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "journal")
    redirect_marks(tmp_path, monkeypatch)
    for place in ("apparmor", "selinux", "units"):
        monkeypatch.setattr(getattr(installation, place), "uninstall", lambda: False)
    return tmp_path


def test_uninstall_removes_the_hook(host: Path) -> None:
    (host / "journal").mkdir()
    (host / "domains").mkdir()
    assert installation.uninstall()
    assert not (host / "qemu.d").exists()
    assert not installation.uninstall()


@pytest.mark.parametrize(
    ("left", "reason"), [("domains/web", "hops are in progress: web"), ("journal/1-2.journal", "was interrupted")]
)
def test_uninstall_refuses_during_a_hop(host: Path, left: str, reason: str) -> None:
    (host / left).parent.mkdir()
    (host / left).touch()
    with pytest.raises(SevhopError, match=reason):
        installation.uninstall()
    assert (host / "qemu.d" / "sevhop").exists()


def test_uninstall_reports_domains_that_are_not_started_again(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error: the package's script prints that."""
    for name in ("web", "db"):
        os.close(reboot_mark.make(name, UUID, "qemu:///system"))
    assert main(["uninstall"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "removed\n"
    assert printed.err == (
        "sevhop: note: the next reboot of db, web is a shutdown, and the hook does not start them again any more; then "
        "run: virsh start\n"
    )
    assert reboot_mark.names() == []
    assert main(["uninstall"]) == 0
    assert capsys.readouterr().err == ""
