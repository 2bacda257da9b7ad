"""Whether SELinux lets libvirt run the hook."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sevhop.install import selinux
from sevhop_qmp.errors import SevhopError

DAEMON = "system_u:system_r:virtd_t:s0-s0:c0.c1023"
LABEL = "system_u:object_r:virt_etc_rw_t:s0"
#: Permissions on files, by their number.
PERMISSIONS = {"read": 2, "open": 20, "execute": 15, "execute_no_trans": 17}


class Kernel:
    """A policy. :ivar granted: permissions of the daemon on files with the label of hooks."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.granted = {"read", "open"}
        self.flags = 0
        self.domain_of_hooks = ""
        (directory / "class/file/perms").mkdir(parents=True)
        for name, number in PERMISSIONS.items():
            (directory / "class/file/perms" / name).write_text(str(number))
        self.enforce = directory / "enforce"
        self.enforce.write_text("1")
        monkeypatch.setattr(selinux, "KERNEL", directory)
        monkeypatch.setattr(selinux, "_ask", self.ask)
        monkeypatch.setattr(selinux, "_context_of", lambda _: DAEMON)
        monkeypatch.setattr(selinux, "_label_of", lambda _: LABEL)

    def ask(self, what: str, context: str, target: str, kind: str) -> str | None:
        assert target == LABEL
        if what == "create":
            return LABEL if kind == "file" else self.domain_of_hooks or context
        mask = sum(1 << PERMISSIONS[name] - 1 for name in self.granted)
        return f"{mask:x} ffffffff 0 ffffffff 1 {self.flags:x}"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def test_hook_that_libvirt_may_not_run_is_not_installed(kernel: Kernel, tmp_path: Path) -> None:
    """Every start of a domain would fail."""
    with pytest.raises(SevhopError, match="labelled virt_etc_rw_t,") as caught:
        selinux.verify_hook(tmp_path / "hooks", [os.getpid()])
    assert "semanage fcontext -a -t bin_t" in caught.value.hint
    kernel.granted.add("execute")
    with pytest.raises(SevhopError):
        selinux.verify_hook(tmp_path / "hooks", [])


def test_hook_that_libvirt_may_run_is_installed(kernel: Kernel, tmp_path: Path) -> None:
    """In its own domain or in another one."""
    kernel.granted |= {"execute", "execute_no_trans"}
    selinux.verify_hook(tmp_path, [os.getpid()])
    kernel.granted.remove("execute_no_trans")
    kernel.domain_of_hooks = "system_u:system_r:virt_hook_t:s0"
    selinux.verify_hook(tmp_path, [os.getpid()])


def test_selinux_that_enforces_nothing_is_not_asked(kernel: Kernel, tmp_path: Path) -> None:
    """As a whole, or for this domain; or there is none."""
    kernel.flags = 1
    selinux.verify_hook(tmp_path, [os.getpid()])
    kernel.flags = 0
    kernel.enforce.write_text("0")
    selinux.verify_hook(tmp_path, [os.getpid()])
    kernel.enforce.unlink()
    selinux.verify_hook(tmp_path, [os.getpid()])
