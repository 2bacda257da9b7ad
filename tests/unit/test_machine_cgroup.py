"""Cgroups for a QEMU beside libvirt, in directories that stand in for the kernel's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from sevhop.process import machine_cgroup, systemd
from sevhop.process.machine_cgroup import MachineCgroup
from sevhop_qmp.errors import SevhopError

PID = 4711
#: As libvirt makes them where systemd manages the host, with cgroup v2.
SLICE = "/machine.slice"
DOMAIN = f"{SLICE}/machine-qemu\\x2d1\\x2dweb1.scope"
INSIDE = {
    "": {"cgroup.subtree_control": "cpuset cpu io memory pids", "memory.max": "1073741824", "pids.max": "100"},
    "libvirt": {"cgroup.subtree_control": "cpuset cpu", "cgroup.type": "domain threaded"},
    "libvirt/emulator": {"cgroup.type": "threaded", "cpuset.cpus": "0-1"},
    "libvirt/vcpu0": {"cgroup.type": "threaded", "cpuset.cpus": "2", "cpu.max": "50000 100000"},
}


class Source:
    """The domain's QEMU."""

    def __init__(self, *cgroups: tuple[str, str]) -> None:
        self.cgroups = list(cgroups)


def beside(*cgroups: tuple[str, str]) -> MachineCgroup | None:
    source: Any = Source(*cgroups)
    return MachineCgroup.beside(source)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hierarchies are; systemd does not manage this host."""
    monkeypatch.setattr(machine_cgroup, "cgroup_directory", lambda controllers, path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(systemd, "BOOTED", tmp_path / "none")
    for group, files in INSIDE.items():
        directory = tmp_path / DOMAIN.lstrip("/") / group
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(f"{text}\n")
    return tmp_path


@pytest.fixture
def create(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernel's directories the files are there."""
    monkeypatch.setattr(machine_cgroup, "_write", Path.write_text)


def test_qemu_in_no_cgroup_of_a_domain_needs_none(root: Path) -> None:
    assert beside(("", "/system.slice/libvirtd.service"), ("cpu", "/")) is None


def test_threads_are_where_their_counterparts_are(root: Path) -> None:
    one = beside(("", f"{DOMAIN}/libvirt/emulator"), ("freezer", "/"))
    assert one is not None
    (top,) = one.directories
    assert Path(top).parent == root / SLICE.lstrip("/")
    assert Path(top).name.startswith("sevhop-transit-") and top.endswith(".scope")
    copy = f"{SLICE}/{Path(top).name}"
    assert one.moved("", f"{DOMAIN}/libvirt/vcpu0") == f"{copy}/libvirt/vcpu0"
    assert one.moved("", DOMAIN) == copy
    assert one.moved("", f"{DOMAIN}-other") == f"{DOMAIN}-other"
    assert one.moved("freezer", "/") == "/"


def test_slice_with_several_domains_is_not_copied(root: Path) -> None:
    one = beside(("", "/qemu-guests.slice/machine-qemu-1.scope/libvirt/emulator"))
    assert one is not None
    assert Path(one.directories[0]).parent == root / "qemu-guests.slice"
    assert beside(("", "/qemu-guests.slice/libvirtd.service")) is None


@pytest.mark.usefixtures("create")
def test_limits_are_those_of_the_domain(root: Path) -> None:
    one = beside(("", f"{DOMAIN}/libvirt/emulator"))
    assert one is not None
    assert one.enter(PID) == []
    (top,) = map(Path, one.directories)
    for group, files in INSIDE.items():
        for name, text in files.items():
            if name not in ("cgroup.type", "cgroup.subtree_control"):
                assert (top / group / name).read_text() == text
    assert (top / "cgroup.subtree_control").read_text() == "+cpuset +cpu +io +memory +pids"
    assert [(top / "libvirt" / name / "cgroup.type").read_text() for name in ("emulator", "vcpu0")] == ["threaded"] * 2
    assert not (top / "libvirt/cgroup.type").exists()
    # Into a threaded group from the one around it, which has no controllers that exclude processes.
    for group in ("libvirt", "libvirt/emulator"):
        assert (top / group / "cgroup.procs").read_text() == str(PID)
    assert not (top / "cgroup.procs").exists()


def test_limit_that_cannot_be_set_is_noted(root: Path) -> None:
    one = beside(("", f"{DOMAIN}/libvirt/emulator"))
    assert one is not None
    notes = one.enter(PID)
    assert "memory.max of the transit is missing, that of the domain 1073741824" in notes


@pytest.mark.usefixtures("create")
def test_scope_is_asked_of_systemd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = root / "programs"
    programs.mkdir()
    (programs / "busctl").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{root}/called\n')
    (programs / "busctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd, "BOOTED", root)
    one = beside(("", f"{DOMAIN}/libvirt/emulator"))
    assert one is not None
    scope = Path(one.directories[0]).name
    read = machine_cgroup._read
    monkeypatch.setattr(
        machine_cgroup, "_read", lambda path: f"0::/{scope}" if path == Path(f"/proc/{PID}/cgroup") else read(path)
    )
    assert one.enter(PID) == []
    words = (root / "called").read_text().splitlines()
    assert words[words.index("StartTransientUnit") + 2 :] == [
        *(scope, "fail", "5", "PIDs", "au", "1", str(PID), "Slice", "s", "machine.slice"),
        *("Delegate", "b", "true", "Before", "as", "2", "virt-guest-shutdown.target", "sevhop-upgrade.service"),
        *("CollectMode", "s", "inactive-or-failed", "0"),
    ]


def test_systemds_refusal_is_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = root / "programs"
    programs.mkdir()
    (programs / "busctl").write_text("#!/bin/sh\necho 'Call failed: no such slice' >&2\nexit 1\n")
    (programs / "busctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd, "BOOTED", root)
    one = beside(("", f"{DOMAIN}/libvirt/emulator"))
    assert one is not None
    with pytest.raises(SevhopError, match="systemd makes no scope for the transit: Call failed: no such slice"):
        one.enter(PID)
