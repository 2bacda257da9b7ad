"""
What a host must have for the SEV context of a guest to be moved into another VM.

The guest runs here, so the host can do SEV; what is tested is the move, and whether the destination gets what the
source once got. The kernel itself reports a full cgroup only when the guest has stopped, with the errno of a move that
is busy.
"""

from __future__ import annotations

import fcntl
import os
import re
import resource
from pathlib import Path

from sevhop_qmp import misc_cgroup
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..guest.inspection import Guest, SevContext
from .result import CheckResult, failed, passed

#: Names of the tests.
NAMES = ("kernel", "kvm_amd", "device", "VM type", "ASID", "memory lock")
#: The first kernel with KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM.
FIRST_KERNEL = (5, 16)
#: libvirt's cgroup of one domain; its destination gets another one.
DOMAIN_GROUP = re.compile(r"machine-qemu.*\.scope|.*\.libvirt-qemu|qemu-\d+-.*")
# <linux/kvm.h>
_KVM_CHECK_EXTENSION = 0xAE03
_KVM_CAP_VM_TYPES = 235
_KVM_X86_SEV_VM, _KVM_X86_SEV_ES_VM = 2, 3


def examine(
    guest: Guest, process: QemuProcess, *, own_group: re.Pattern[str] | None, sandbox: bool, system: Path = Path("/")
) -> list[CheckResult]:
    """
    Test the host for a guest with an SEV context.

    :param own_group: names of those cgroups of the source that the destination will not be in; None if it will be in
        all of them.
    :param sandbox: whether QEMU gets a device directory of its own, with /dev/sev in it.
    :param system: where /sys, /dev and /proc are.
    """
    return [
        kernel(os.uname().release),
        _module(guest.context, system),
        _device(guest.context, process, sandbox, system),
        _vm_type(guest.context, system),
        _room(guest.context, process.pid, own_group, system),
        _memory_lock(guest, process),
    ]


def kernel(release: str) -> CheckResult:
    """Whether a kernel of this release can move a context."""
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None:
        return failed("kernel", f"cannot parse release {release}", "Linux 5.16 or later is needed")
    if (int(found[1]), int(found[2])) < FIRST_KERNEL:
        return failed("kernel", f"Linux {release} cannot move a context", "Linux 5.16 or later is needed")
    return passed("kernel", f"Linux {release}")


def _module(context: SevContext, system: Path) -> CheckResult:
    name = "kvm_amd"
    parameter = system / "sys/module/kvm_amd/parameters" / context.kind.replace("-", "_")
    try:
        value = parameter.read_text().strip()
    except OSError:
        return failed(name, f"{parameter} is missing", "load kvm_amd with sev=1 on a host with SEV")
    if value not in ("Y", "1"):
        return failed(name, f"{parameter} is {value}", f"load kvm_amd with {parameter.name}=1")
    return passed(name, f"{parameter.name}={value}")


def _device(context: SevContext, process: QemuProcess, sandbox: bool, system: Path) -> CheckResult:
    path = system / context.device.lstrip("/")
    if not path.exists():
        return failed("device", f"{path} is missing", "load the module ccp")
    # In there libvirt makes QEMU's user the owner of the device.
    if not sandbox:
        identity = process.credentials
        if not identity.may("rw", path):
            return failed("device", f"QEMU's user ({identity.uid}) may not open {path}", f"give it access to {path}")
    return passed("device", str(path))


def _vm_type(context: SevContext, system: Path) -> CheckResult:
    # QEMU 9.1 falls back where the kernel has no such VMs.
    if context.typed and _kernel_has_types(system / "dev/kvm"):
        return failed(
            "VM type",
            "made by KVM_SEV_INIT2: kernels so far move such a context, but the guest does not run afterwards",
            "start the guest with legacy-vm-type=on on its sev-guest object",
        )
    return passed("VM type", "made by KVM_SEV_INIT")


def _kernel_has_types(device: Path) -> bool:
    try:
        kvm = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        types = fcntl.ioctl(kvm, _KVM_CHECK_EXTENSION, _KVM_CAP_VM_TYPES)
    except OSError:
        return True
    finally:
        os.close(kvm)
    return bool(types & (1 << _KVM_X86_SEV_VM | 1 << _KVM_X86_SEV_ES_VM))


def _room(context: SevContext, pid: int, own_group: re.Pattern[str] | None, system: Path) -> CheckResult:
    """A move from one cgroup into another is charged to both for a moment, and to those above both twice."""
    name = "ASID"
    if own_group is None:
        return passed(name, "the new QEMU will be in the cgroup of the old one, which has one")
    full = misc_cgroup.find_full(
        pid,
        system / "sys/fs/cgroup",
        system / "proc",
        resources=(context.kind.replace("-", "_"),),
        above=own_group,
    )
    if full is not None:
        return failed(name, f"none is left for the new QEMU: {full}", "raise misc.max, or shut another guest down")
    return passed(name, "there is room for one more")


def _memory_lock(guest: Guest, process: QemuProcess) -> CheckResult:
    name = "memory lock"
    try:
        limit = process.limits[resource.RLIMIT_MEMLOCK][0]
        unlimited = limit == resource.RLIM_INFINITY or process.credentials.may_lock_memory
    except (SevhopError, KeyError) as err:
        return failed(name, f"the limit of process {process.pid} cannot be read: {err}", "run sevhop as root")
    if unlimited:
        return passed(name, "unlimited")
    if limit < guest.memory:
        return failed(
            name,
            f"QEMU may lock {limit >> 20} MiB, the guest has {guest.memory >> 20}",
            "raise it: <memtune><hard_limit> of a domain, LimitMEMLOCK= of a unit, or prlimit --memlock",
        )
    return passed(name, f"{limit >> 20} MiB")
