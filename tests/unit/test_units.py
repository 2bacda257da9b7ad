"""The units, as systemd's own tools see them. systemd itself does not run here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sevhop.install import units
from sevhop.process import systemd
from sevhop_qmp.errors import SevhopError

#: The highest exposure that ``systemd-analyze security`` may report, in tenths: 0 is a unit that can do nothing.
_EXPOSURE = {"sevhop-recover.service": 27, "sevhop-upgrade.service": 85}
#: Settings by which a process and its children lose capabilities, get no_new_privs or seccomp filters, or another
#: namespace than of mounts and network: beginnings of their names (systemd.exec(5)).
_INHERITED = (
    *("CapabilityBoundingSet", "AmbientCapabilities", "NoNewPrivileges", "User", "DynamicUser", "SecureBits"),
    *("SystemCall", "Restrict", "LockPersonality", "MemoryDenyWriteExecute", "ProtectClock", "ProtectKernel"),
    *("ProtectHostname", "PrivateDevices", "PrivateUsers", "PrivateIPC", "ProtectControlGroups", "AppArmorProfile"),
)


@pytest.fixture
def analyze() -> str:
    """The program."""
    if (program := shutil.which("systemd-analyze")) is None:
        pytest.skip("not installed: systemd")
    return program


@pytest.fixture
def booted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that logs its arguments. :return: its log."""
    calls = tmp_path / "calls"
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    monkeypatch.setattr(units, "DIRECTORY", tmp_path)
    return calls


def test_units_are_installed_and_removed(booted: Path, tmp_path: Path) -> None:
    installed = units.install()
    assert installed == [tmp_path / name for name in units.NAMES]
    assert {path.stat().st_mode & 0o777 for path in installed} == {0o644}
    assert not any("@PYTHON@" in path.read_text() for path in installed)
    recover = "sevhop-recover.service sevhop-recover.path"
    assert booted.read_text().splitlines() == ["daemon-reload", f"enable {recover}", "start sevhop-recover.path"]
    booted.unlink()
    assert units.uninstall()
    assert booted.read_text().splitlines() == [f"disable --now {' '.join(units.NAMES)}", "daemon-reload"]
    assert not any(path.exists() for path in installed)
    assert not units.uninstall()


def test_units_of_the_package_stay(booted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    for name in units.NAMES:
        (packaged / name).touch()
    monkeypatch.setattr(units, "PACKAGED", packaged)
    assert units.install() == []
    assert not units.uninstall()
    assert not booted.exists()


def test_install_fails_if_systemctl_does(booted: Path, tmp_path: Path) -> None:
    (tmp_path / "systemctl").write_text("#!/bin/sh\necho no >&2; exit 1\n")
    with pytest.raises(SevhopError, match="systemctl daemon-reload: no"):
        units.install()


def test_install_does_nothing_without_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "BOOTED", tmp_path / "missing")
    monkeypatch.setattr(units, "DIRECTORY", tmp_path)
    assert units.install() == []
    assert not units.uninstall()
    assert list(tmp_path.iterdir()) == []


def test_units_are_valid(analyze: str, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in units.NAMES]
    for path in paths:
        path.write_text(units.text(path.name))
    done = subprocess.run([analyze, "verify", *paths], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_path_starts_the_timer_and_that_the_service() -> None:
    path, timer, service = units.UPGRADE
    assert f"\nUnit={timer}\n" in units.text(path)
    assert "Unit=" not in units.text(timer).replace("[Unit]", "")  # by its name
    assert timer.removesuffix(".timer") == service.removesuffix(".service")


def test_units_can_be_enabled(tmp_path: Path) -> None:
    if (program := shutil.which("systemctl")) is None:
        pytest.skip("not installed: systemd")
    directory = tmp_path / str(units.DIRECTORY).lstrip("/")
    directory.mkdir(parents=True)
    for name in units.NAMES:
        (directory / name).write_text(units.text(name))
    enabled = (*units.RECOVER, units.UPGRADE[0])
    subprocess.run([program, f"--root={tmp_path}", "enable", *enabled], capture_output=True, check=True)
    wanted = {(path.parent.name, path.name) for path in directory.glob("*.wants/*")}
    assert wanted == {
        ("multi-user.target.wants", "sevhop-recover.service"),
        ("paths.target.wants", "sevhop-recover.path"),
        ("paths.target.wants", "sevhop-upgrade.path"),
    }


@pytest.mark.parametrize(("name", "exposure"), _EXPOSURE.items())
def test_exposure_of_units_is_below_the_limit(name: str, exposure: int, analyze: str, tmp_path: Path) -> None:
    unit = tmp_path / name
    unit.write_text(units.text(name))
    command = [analyze, "security", "--offline=yes", f"--threshold={exposure}", "--json=short", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, [row["name"] for row in json.loads(done.stdout) if row["exposure"]]


def test_transit_inherits_no_limits_of_the_upgrade_service() -> None:
    names = [line.partition("=")[0] for line in units.text("sevhop-upgrade.service").splitlines()]
    assert [name for name in names if name.startswith(_INHERITED)] == []


@pytest.mark.parametrize(
    ("path", "quoted"), [("/usr/bin/python3", '"/usr/bin/python3"'), ('/a b/"%i$x\\', '"/a b/\\"%%i$$x\\\\"')]
)
def test_path_in_a_unit_is_quoted(path: str, quoted: str) -> None:
    assert units.quoted(path) == quoted


def test_units_run_this_python() -> None:
    for name, command in (
        ("recover", "recover --unattended --timeout 30\n"),
        ("upgrade", "upgrade --outdated --keep-going "),
    ):
        start = f"ExecStart={units.quoted(sys.executable)} -m sevhop.cli {command}"
        assert start in units.text(f"sevhop-{name}.service")
