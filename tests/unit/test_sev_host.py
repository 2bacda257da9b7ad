"""What the host must have for a guest with an SEV context, on hosts made of files."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

import pytest
from sevhop.checks import sev_host
from sevhop.checks.result import CheckResult, Status
from sevhop.guest.inspection import Guest, SevContext
from sevhop_qmp.credentials import Credentials

from .inspected_guest import guest

PID = 7
SCOPE = r"machine.slice/machine-qemu\x2d1\x2dweb.scope"
CONTEXT = SevContext("sev", device="/dev/sev")


class Process:
    """As much of a process as is tested."""

    def __init__(self) -> None:
        self.pid = PID
        self.credentials = Credentials(0, 0, (), 0)
        self.limits = {resource.RLIMIT_MEMLOCK: (1 << 30, 1 << 30)}


class Host:
    """A host with SEV, and one guest in a scope of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process = Process()
        self.guest: Guest = guest(context=CONTEXT, memory=1 << 30)
        root.chmod(0o755)
        self.write("sys/module/kvm_amd/parameters/sev", "Y\n")
        self.write("dev/sev", "")
        self.write("proc/sys/kernel/osrelease", "6.12.0-124.el10.x86_64\n")
        self.write(f"proc/{PID}/cgroup", f"0::/{SCOPE}/libvirt/emulator\n")
        self.write("sys/fs/cgroup/misc.capacity", "sev 10\nsev_es 5\n")
        self.write("sys/fs/cgroup/misc.current", "sev 1\nsev_es 5\n")

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def found(self, name: str, *, libvirt: bool = True) -> CheckResult:
        results = sev_host.examine(
            self.guest,
            self.process,  # type: ignore[arg-type]
            own_group=sev_host.DOMAIN_GROUP if libvirt else None,
            sandbox=libvirt,
            system=self.root,
        )
        assert tuple(one.name for one in results) == sev_host.NAMES
        (result,) = (one for one in results if one.name == name)
        assert bool(result.hint) == (result.status is Status.FAIL)
        return result


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("libvirt", [True, False])
def test_checks_pass_on_a_host_that_has_everything(host: Host, libvirt: bool) -> None:
    for name in sev_host.NAMES:
        assert host.found(name, libvirt=libvirt).status is Status.PASS, name


@pytest.mark.parametrize(
    ("release", "status"),
    [
        ("5.15.0-91-generic", Status.FAIL),
        ("4.18.0-553.el8.x86_64", Status.FAIL),
        ("nonsense", Status.FAIL),
        ("5.16.0", Status.PASS),
        ("6.1.0-39-amd64", Status.PASS),
        ("10.0.0", Status.PASS),
    ],
)
def test_kernel_passes_from_5_16(release: str, status: Status) -> None:
    result = sev_host.kernel(release, b"")
    assert result.status is status
    assert bool(result.hint) == (status is Status.FAIL)


#: Names in kvm_amd's type information: as of Debian's 6.16, 6.17 and 7.3.
TYPES = {
    "none": b"",
    "before": b"\0asid\0misc_cg\0",
    "selective": b"\0asid\0have_run_cpus\0misc_cg\0",
    "fixed": b"\0asid\0have_run_cpus\0misc_cg\0sev_free_have_run_cpus\0",
}


@pytest.mark.parametrize(
    ("release", "types", "status"),
    [
        ("6.16.12+deb13-amd64", "none", Status.PASS),
        ("6.17.0-5-generic", "none", Status.FAIL),
        ("6.18.55", "none", Status.FAIL),
        ("6.18.56", "none", Status.PASS),
        ("7.1.99", "none", Status.FAIL),
        ("7.2", "none", Status.FAIL),
        ("7.2.9+deb13-amd64", "none", Status.FAIL),
        ("7.2.10", "none", Status.PASS),
        ("7.3-amd64", "none", Status.PASS),
        ("7.3.0-rc2-amd64", "none", Status.FAIL),
        ("7.3-rc7-amd64", "fixed", Status.PASS),
        ("7.4-rc1-amd64", "none", Status.PASS),
        ("7.3.4+deb13-amd64", "fixed", Status.PASS),
        ("6.17.13+deb13-amd64", "selective", Status.FAIL),
        ("7.2.10", "selective", Status.PASS),
        # Changes of later kernels in those of distributions.
        ("6.12.0-124.el10.x86_64", "selective", Status.FAIL),
        ("6.12.0-200.el10.x86_64", "fixed", Status.PASS),
        ("7.0.0-30-generic", "fixed", Status.PASS),
        ("6.17.0-5-generic", "before", Status.PASS),
    ],
)
def test_kernel_fails_if_it_forgets_who_has_cached_data_of_the_source(release: str, types: str, status: Status) -> None:
    assert sev_host.kernel(release, TYPES[types]).status is status


def test_kernel_is_judged_by_the_types_of_its_module(host: Host) -> None:
    assert host.found("kernel").status is Status.PASS
    host.write("sys/kernel/btf/kvm_amd", TYPES["selective"].decode())
    assert host.found("kernel").status is Status.FAIL


@pytest.mark.parametrize("value", ["N", "0", None])
def test_kvm_amd_fails_without_sev(host: Host, value: str | None) -> None:
    parameter = host.write("sys/module/kvm_amd/parameters/sev", f"{value}\n")
    if value is None:
        parameter.unlink()
    assert host.found("kvm_amd").status is Status.FAIL


def test_module_parameter_depends_on_the_sev_generation(host: Host) -> None:
    host.guest = host.guest._replace(context=SevContext("sev-es"))
    assert host.found("kvm_amd").status is Status.FAIL
    host.write("sys/module/kvm_amd/parameters/sev_es", "Y\n")
    assert host.found("kvm_amd").status is Status.PASS


def test_device_fails_if_missing(host: Host) -> None:
    (host.root / "dev/sev").unlink()
    assert host.found("device").status is Status.FAIL


def test_device_fails_if_the_user_may_not_open_it(open_directory: Path) -> None:
    host = Host(open_directory)
    (host.root / "dev/sev").chmod(0o640)
    host.process.credentials = Credentials(65534, 65534, (0,), 0)
    result = host.found("device", libvirt=False)
    assert result.status is Status.FAIL, "reading is not enough"
    assert host.found("device").status is Status.PASS, "libvirt makes the user its owner"
    (host.root / "dev/sev").chmod(0o660)
    assert host.found("device", libvirt=False).status is Status.PASS


def test_vm_type_fails_of_kvm_sev_init2(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.guest = host.guest._replace(context=dataclasses.replace(CONTEXT, typed=True))
    result = host.found("VM type")
    assert result.status is Status.FAIL, "where KVM does not answer, QEMU is trusted"
    assert "legacy-vm-type=on" in result.hint
    monkeypatch.setattr(sev_host, "kernel_has_types", lambda _: False)
    assert host.found("VM type").status is Status.PASS


def test_asid_fails_if_none_is_left(host: Host) -> None:
    host.write("sys/fs/cgroup/misc.current", "sev 10\nsev_es 0\n")
    result = host.found("ASID")
    assert result.status is Status.FAIL
    assert "cgroup /: sev 10 of 10 in use" in result.detail
    assert host.found("ASID", libvirt=False).status is Status.PASS, "it takes the source's place"


def test_asid_is_tested_above_the_domains_own_cgroup(host: Host) -> None:
    host.write(f"sys/fs/cgroup/{SCOPE}/misc.max", "sev 1\n")
    host.write(f"sys/fs/cgroup/{SCOPE}/misc.current", "sev 1\n")
    assert host.found("ASID").status is Status.PASS, "the destination gets a scope of its own"
    host.write("sys/fs/cgroup/machine.slice/misc.max", "sev 1\n")
    host.write("sys/fs/cgroup/machine.slice/misc.current", "sev 1\n")
    assert "cgroup /machine.slice: sev 1 of 1" in host.found("ASID").detail


def test_asid_passes_without_a_cgroup_of_its_own(host: Host) -> None:
    host.write(f"proc/{PID}/cgroup", "0::/system.slice/libvirtd.service\n")
    host.write("sys/fs/cgroup/misc.current", "sev 10\n")
    assert host.found("ASID").status is Status.PASS


@pytest.mark.parametrize(
    ("group", "own"),
    [
        (r"machine-qemu\x2d1\x2dweb.scope", True),
        ("qemu-1-web.libvirt-qemu", True),
        ("qemu-12-a.b", True),
        ("machine.slice", False),
        ("system.slice", False),
    ],
)
def test_domain_group_matches_libvirts_cgroups_of_a_domain(group: str, own: bool) -> None:
    assert bool(sev_host.DOMAIN_GROUP.fullmatch(group)) == own


def test_memory_lock_needs_the_size_of_the_guest(host: Host) -> None:
    assert host.found("memory lock").status is Status.PASS
    host.process.limits[resource.RLIMIT_MEMLOCK] = ((1 << 30) - 1, 1 << 40)
    result = host.found("memory lock")
    assert (result.status, result.detail) == (Status.FAIL, "QEMU may lock 1023 MiB, the guest has 1024")
    host.process.credentials = Credentials(1000, 1000, (), 0, 1 << 14)
    assert host.found("memory lock").detail == "unlimited", "with CAP_IPC_LOCK there is no limit"
    host.process.credentials = Credentials(1000, 1000, (), 0, 0x8000)
    assert host.found("memory lock").status is Status.FAIL
    host.process.limits[resource.RLIMIT_MEMLOCK] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert host.found("memory lock").status is Status.PASS


@pytest.mark.parametrize("device", ["/nonexistent", "/dev/null"])
def test_vm_types_are_assumed_if_kvm_does_not_answer(device: str) -> None:
    assert sev_host.kernel_has_types(Path(device))
