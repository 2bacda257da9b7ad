"""SELinux: the policy module, what the kernel is asked about the policy, and the labels of what is shared."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sevhop.checks.domain import _confinement
from sevhop.checks.result import Status
from sevhop.disks import image_labels
from sevhop.install import selinux as installation
from sevhop.install import verification
from sevhop.libvirt import hook_server
from sevhop.process.apparmor_profile import ProfileCopy
from sevhop.records import run_directory
from sevhop_qmp import adopt_library, selinux
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

DAEMON = "system_u:system_r:virtd_t:s0-s0:c0.c1023"
QEMU = "system_u:system_r:svirt_t:s0:c1,c2"
OWN = "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023"
LABEL = "system_u:object_r:virt_etc_rw_t:s0"
#: Permissions of each class, by their number.
PERMISSIONS = {
    "file": {"read": 2, "write": 3, "getattr": 4, "map": 9, "execute": 15, "execute_no_trans": 17, "open": 20},
    "blk_file": {"read": 2, "write": 3},
    "process": {"noatsecure": 25},
}


class Kernel:
    """
    A policy.

    :ivar granted: permissions of everybody, by the type of the target.
    :ivar types: those that it has.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.granted: dict[str, set[str]] = {"virt_etc_rw_t": {"read", "open"}}
        self.types = {"svirt_image_t"}
        self.flags = 0
        self.domain_of_hooks = ""
        for kind, permissions in PERMISSIONS.items():
            (directory / f"class/{kind}/perms").mkdir(parents=True)
            for name, number in permissions.items():
                (directory / f"class/{kind}/perms" / name).write_text(str(number))
        self.enforce = directory / "enforce"
        self.enforce.write_text("1")
        self.attributes = directory / "attributes"
        self.attributes.mkdir()
        (self.attributes / "current").write_text(f"{OWN}\0")
        (self.attributes / "sockcreate").touch()
        monkeypatch.setattr(selinux, "KERNEL", directory)
        monkeypatch.setattr(selinux, "ATTRIBUTE", "user.sevhop-test")
        monkeypatch.setattr(selinux, "_OWN", self.attributes / "current")
        monkeypatch.setattr(selinux, "_SOCKETS", self.attributes / "sockcreate")
        monkeypatch.setattr(selinux, "ask", self.ask)
        monkeypatch.setattr(selinux, "knows", lambda context: selinux.type_of(context) in self.types)
        monkeypatch.setattr(selinux, "context_of", lambda process: OWN if process == "self" else DAEMON)

    def ask(self, what: str, context: str, target: str, kind: str) -> str | None:
        if what == "create":
            return LABEL if kind == "file" else self.domain_of_hooks or context
        found = self.granted.get(selinux.type_of(target), set()) & PERMISSIONS[kind].keys()
        mask = sum(1 << PERMISSIONS[kind][name] - 1 for name in found)
        return f"{mask:x} ffffffff 0 ffffffff 1 {self.flags:x}"

    def load(self) -> None:
        """The module."""
        self.types |= {selinux.TYPE, installation.HOOK, "lib_t"}
        self.granted |= {
            installation.HOOK: {"read", "open", "execute", "execute_no_trans"},
            "svirt_t": {"noatsecure"},
            "lib_t": {"read", "open", "getattr", "map", "execute"},
        }

    def unload(self) -> None:
        self.types = {"svirt_image_t"}
        self.granted.pop("svirt_t", None)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    directory = tmp_path / "selinuxfs"
    directory.mkdir()
    return Kernel(directory, monkeypatch)


@pytest.fixture
def labelled(kernel: Kernel, tmp_path: Path) -> Path:
    """A directory with a label."""
    path = tmp_path / "hooks"
    path.mkdir()
    os.setxattr(path, selinux.ATTRIBUTE, LABEL.encode())
    return path


# -- whether libvirt may run the hook ------------------------------------------------------------------


def test_hook_that_libvirt_may_not_run_is_not_installed(kernel: Kernel, labelled: Path) -> None:
    """Every start of a domain would fail."""
    with pytest.raises(SevhopError, match="labelled virt_etc_rw_t,") as caught:
        installation.verify_hook(labelled / "qemu.d", [os.getpid()])
    assert "semanage fcontext -a -t bin_t" in caught.value.hint
    kernel.granted["virt_etc_rw_t"].add("execute")
    with pytest.raises(SevhopError):
        installation.verify_hook(labelled, [])


def test_hook_that_libvirt_may_run_is_installed(kernel: Kernel, labelled: Path) -> None:
    """In its own domain or in another one."""
    kernel.granted["virt_etc_rw_t"] |= {"execute", "execute_no_trans"}
    installation.verify_hook(labelled, [os.getpid()])
    kernel.granted["virt_etc_rw_t"].remove("execute_no_trans")
    kernel.domain_of_hooks = "system_u:system_r:virt_hook_t:s0"
    installation.verify_hook(labelled, [os.getpid()])


def test_hook_with_the_modules_type_may_be_run(kernel: Kernel, labelled: Path) -> None:
    """Whatever its directory is labelled."""
    kernel.load()
    installation.verify_hook(labelled, [os.getpid()])
    kernel.granted[installation.HOOK].remove("execute")
    with pytest.raises(SevhopError, match=installation.HOOK):
        installation.verify_hook(labelled, [os.getpid()])


def test_selinux_that_enforces_nothing_is_not_asked(kernel: Kernel, labelled: Path) -> None:
    """As a whole, or for this domain; or there is none."""
    kernel.flags = 1
    installation.verify_hook(labelled, [os.getpid()])
    kernel.flags = 0
    kernel.enforce.write_text("0")
    installation.verify_hook(labelled, [os.getpid()])
    kernel.enforce.unlink()
    installation.verify_hook(labelled, [os.getpid()])


# -- the module ------------------------------------------------------------------------------------------


class Tools:
    """The tools of the policy. :ivar calls: of semodule, without the path of the module."""

    def __init__(self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = kernel
        self.calls: list[list[str]] = []
        self.module = ""
        self.refusal = ""
        self.loads = True
        monkeypatch.setattr(installation, "_semodule", self.semodule)

    def semodule(self, action: str, name: str) -> None:
        self.calls.append([action, Path(name).name])
        if self.refusal:
            raise SevhopError(self.refusal)
        if action == "-r":
            self.kernel.unload()
            return
        self.module = Path(name).read_text()
        if self.loads:
            self.kernel.load()


@pytest.fixture
def tools(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    monkeypatch.setattr(run_directory, "RUN", tmp_path / "run")
    monkeypatch.setattr(installation, "_STORE", tmp_path / "store")
    client, library = tmp_path / "client", tmp_path / "adopt.so"
    for path in (client, library):
        path.touch()
        os.setxattr(path, selinux.ATTRIBUTE, b"system_u:object_r:usr_t:s0")
    monkeypatch.setattr(hook_server, "CLIENT", client)
    monkeypatch.setattr(adopt_library, "path", lambda: library)
    return Tools(kernel, monkeypatch)


SCRIPT = Path("/etc/libvirt/hooks/qemu.d/sevhop")


def test_module_is_loaded_and_files_are_labelled(kernel: Kernel, tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.setxattr(tmp_path / "run", selinux.ATTRIBUTE, b"system_u:object_r:var_run_t:s0")
    (kept,) = installation.install(SCRIPT, [os.getpid()])
    assert kept.parts[-2:] == ("400", "sevhop")
    assert tools.calls == [["-i", "sevhop.cil"]]
    assert r'(filecon "/etc/libvirt/hooks/qemu\.d/sevhop" file' in tools.module
    assert "@" not in tools.module
    types = {name: selinux.type_of(selinux.label_of(tmp_path / name)) for name in ("client", "adopt.so", "run")}
    assert types == {"client": installation.HOOK, "adopt.so": "lib_t", "run": selinux.TYPE}


def test_module_that_is_not_accepted_changes_nothing(tools: Tools, tmp_path: Path) -> None:
    tools.refusal = "no"
    with pytest.raises(SevhopError, match="no"):
        installation.install(SCRIPT, [])
    assert tools.calls == [["-i", "sevhop.cil"]]
    assert selinux.type_of(selinux.label_of(tmp_path / "client")) == "usr_t"


def test_module_that_does_not_suffice_is_unloaded(
    kernel: Kernel, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was there before: then it is what the host had."""
    kernel.granted["svirt_t"] = set()
    load = kernel.load

    def load_without_rules() -> None:
        load()
        kernel.granted["svirt_t"] = set()

    monkeypatch.setattr(kernel, "load", load_without_rules)
    with pytest.raises(SevhopError, match="no rules for libvirt's daemon as it runs here"):
        installation.install(SCRIPT, [os.getpid()])
    assert tools.calls == [["-i", "sevhop.cil"], ["-r", "sevhop"]]
    tools.calls.clear()
    load()
    with pytest.raises(SevhopError):
        installation.install(SCRIPT, [os.getpid()])
    assert tools.calls == [["-i", "sevhop.cil"]]


def test_module_that_is_not_loaded_after_all_is_reported(tools: Tools) -> None:
    tools.loads = False
    with pytest.raises(SevhopError, match="is not loaded"):
        installation.install(SCRIPT, [])


def test_nothing_is_installed_where_the_policy_does_not_know_libvirt(kernel: Kernel, tools: Tools) -> None:
    kernel.types.clear()
    assert installation.install(SCRIPT, []) == []
    kernel.enforce.unlink()
    assert installation.install(SCRIPT, []) == []
    assert not installation.uninstall()
    assert tools.calls == []


def test_uninstall_unloads_the_module_once(kernel: Kernel, tools: Tools) -> None:
    installation.install(SCRIPT, [])
    assert installation.uninstall()
    assert tools.calls[-1] == ["-r", "sevhop"]
    assert not installation.uninstall()


def test_path_that_a_module_cannot_have_is_refused() -> None:
    with pytest.raises(SevhopError, match="cannot have rules"):
        installation.rules(SCRIPT, Path("/opt/a b/client"), Path("/adopt.so"))
    assert r"/opt/a\+\(b\)/x" in installation.rules(SCRIPT, Path("/opt/a+(b)/x"), Path("/adopt.so"))


def test_tools_that_fail_or_are_missing_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "semodule"
    program.write_text("#!/bin/sh\necho one >&2; echo the reason >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SevhopError, match=r"policy module sevhop: the reason \(nothing was changed\)"):
        installation._semodule("-i", "/module")
    monkeypatch.setattr(shutil, "which", lambda name: "/no/such/semodule")
    with pytest.raises(SevhopError, match="install the package policycoreutils"):
        installation._semodule("-i", "/module")


# -- the check -------------------------------------------------------------------------------------------


class Confined:
    """A QEMU with a label, and with one file open."""

    pid = os.getpid()

    def __init__(self, path: Path | None = None, confinement: str = QEMU, flags: int = os.O_RDWR) -> None:
        self.confinement = confinement
        self.path = path
        self.number = os.open(path, os.O_RDWR) if path else -1
        self.flags = flags

    def descriptors(self) -> list[Any]:
        return [SimpleNamespace(number=self.number, target=str(self.path))] if self.path else []

    def descriptor_info(self, number: int) -> dict[str, str]:
        assert number == self.number
        return {"pos": "0", "flags": f"{self.flags | os.O_CLOEXEC:o}"}


@pytest.mark.parametrize(
    ("loaded", "enforcing", "status"), [(True, True, "PASS"), (False, True, "FAIL"), (False, False, "PASS")]
)
def test_check_refuses_without_the_module(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, loaded: bool, enforcing: bool, status: str
) -> None:
    monkeypatch.setattr(verification, "daemons", lambda: {"libvirtd": os.getpid()})
    kernel.enforce.write_text(str(int(enforcing)))
    if loaded:
        kernel.load()
    result = _confinement(cast(QemuProcess, Confined()), "")
    assert result.status is Status[status]
    if status == "FAIL":
        assert "the policy module sevhop is not loaded" in result.detail
        assert result.hint == "run: sevhop install"
    else:
        assert result.detail == f"SELinux, {QEMU}"


def test_check_names_a_daemon_that_the_module_does_not_know(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.load()
    kernel.granted["svirt_t"] = set()
    monkeypatch.setattr(verification, "daemons", lambda: {"libvirtd": os.getpid()})
    result = _confinement(cast(QemuProcess, Confined()), "")
    assert f"has no rule for {DAEMON}" in result.detail


def test_transit_needs_no_copy_of_a_label() -> None:
    """Nothing takes that back."""
    assert ProfileCopy.of(QEMU) is None


@pytest.mark.parametrize(
    ("before", "flags", "reason"),
    [
        ("system_u:object_r:virt_image_t:s0", os.O_RDWR, ""),
        ("system_u:object_r:user_home_t:s0", os.O_RDONLY, ""),
        ("system_u:object_r:user_home_t:s0", os.O_RDWR, "SELinux does not let a QEMU use that"),
        ("", os.O_RDWR, "it is not known how"),
    ],
)
def test_transit_can_use_the_images_that_libvirt_has_given_back(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, flags: int, reason: str
) -> None:
    kernel.granted |= {"virt_image_t": {"read", "write"}, "user_home_t": {"read"}}
    monkeypatch.setattr(image_labels, "_REMEMBERED", "user.sevhop-remembered")
    image = tmp_path / "image"
    image.touch()
    os.setxattr(image, selinux.ATTRIBUTE, b"system_u:object_r:svirt_image_t:s0:c1,c2")
    if before:
        os.setxattr(image, "user.sevhop-remembered", before.encode())
    confined = Confined(image, flags=flags)
    process = cast(QemuProcess, confined)
    assert (reason in image_labels.unusable(process)) if reason else image_labels.unusable(process) == ""
    os.setxattr(image, selinux.ATTRIBUTE, b"system_u:object_r:virt_content_t:s0")
    assert image_labels.unusable(process) == ""
    kernel.enforce.write_text("0")
    assert image_labels.unusable(process) == ""
    confined.confinement = "unconfined"
    assert image_labels.unusable(process) == ""
    os.close(confined.number)


# -- labels of what is shared ----------------------------------------------------------------------------


def test_descriptor_is_labelled_with_the_lowest_level(kernel: Kernel, tmp_path: Path) -> None:
    """All QEMUs have that; which of them gets the descriptor is ours to decide."""
    with open(tmp_path / "file", "w+b") as file:
        os.setxattr(file.fileno(), selinux.ATTRIBUTE, b"unconfined_u:object_r:user_tmp_t:s0")
        selinux.share(file.fileno())
        assert selinux.type_of(selinux.label_of(file.fileno())) == "user_tmp_t", "there is no module"
        kernel.load()
        selinux.share(file.fileno())
        assert selinux.label_of(file.fileno()) == "unconfined_u:object_r:sevhop_run_t:s0"


def test_label_that_cannot_be_given_is_reported(kernel: Kernel, tmp_path: Path) -> None:
    kernel.load()
    with pytest.raises(SevhopError, match=r"cannot label .*/missing as sevhop_run_t"):
        selinux.share(tmp_path / "missing")


def test_sockets_are_labelled_while_they_are_made(kernel: Kernel) -> None:
    attribute = kernel.attributes / "sockcreate"
    with selinux.sharing_sockets():
        assert attribute.read_text() == "", "there is no module"
    kernel.load()
    with selinux.sharing_sockets(), socket.socket(socket.AF_UNIX):
        assert attribute.read_text() == "unconfined_u:object_r:sevhop_run_t:s0"
    assert attribute.read_text().startswith("\n"), "the kernel takes that for none"


def test_run_directory_is_labelled(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.load()
    monkeypatch.setattr(run_directory, "RUN", tmp_path / "run")
    (tmp_path / "run").mkdir(mode=0o711)
    os.setxattr(tmp_path / "run", selinux.ATTRIBUTE, b"system_u:object_r:var_run_t:s0")
    assert stat.S_ISDIR(run_directory.make().stat().st_mode)
    assert selinux.type_of(selinux.label_of(tmp_path / "run")) == selinux.TYPE


@pytest.mark.parametrize(
    ("confinement", "context"),
    [
        (QEMU, QEMU),
        ("staff_u:staff_r:staff_t", "staff_u:staff_r:staff_t"),
        ("unconfined", ""),
        ("", ""),
        ("libvirt-1:2:3:4 (enforce)", ""),
    ],
)
def test_context_is_distinguished_from_other_labels(confinement: str, context: str) -> None:
    assert selinux.context_in(confinement) == context


def test_policy_without_levels_has_labels_without_one() -> None:
    assert selinux.object_context("staff_u:staff_r:staff_t", "lib_t") == "staff_u:object_r:lib_t"
