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
#: Since this kernel KVM remembers which processors have run a VM, and writes back the caches of those alone when memory
#: of the VM is freed. A move forgets those of the source, but for FIXED_KERNEL and later, and these stable releases, in
#: which it writes back theirs.
SELECTIVE_KERNEL = (6, 17)
FIXED_KERNEL = (7, 3)
FIXED_STABLE = {(6, 18): 56, (7, 2): 10}
#: Names in kvm_amd's type information: of what remembers those processors, and of what came with the fix. Distributions
#: have either in kernels of other versions.
_SELECTIVE, _FIXED = b"\0have_run_cpus\0", b"\0sev_free_have_run_cpus\0"
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
        kernel((system / "proc/sys/kernel/osrelease").read_text().strip(), _types(system)),
        _module(guest.context, system),
        _device(guest.context, process, sandbox, system),
        _vm_type(guest.context, system),
        _room(guest.context, process.pid, own_group, system),
        _memory_lock(guest, process),
    ]


def kernel(release: str, types: bytes) -> CheckResult:
    """
    Whether a kernel can move a context, and does no harm by it.

    :param release: what uname -r prints.
    :param types: the type information (BTF) of its kvm_amd; empty if it has none.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if found is None:
        return failed("kernel", f"cannot parse release {release}", "Linux 5.16 or later is needed")
    series, update = (int(found[1]), int(found[2])), int(found[3] or 0)
    if series < FIRST_KERNEL:
        return failed("kernel", f"Linux {release} cannot move a context", "Linux 5.16 or later is needed")
    if _leaves_caches(series, update, types, candidate="-rc" in release):
        return failed(
            "kernel",
            f"Linux {release} moves a context and forgets which processors have cached data of the guest: when it "
            "has shut down, that may be written over memory in use",
            "boot Linux 7.3 or later, 7.2 from 7.2.10 on, 6.18 from 6.18.56 on, or one before 6.17",
        )
    return passed("kernel", f"Linux {release}")


def _leaves_caches(series: tuple[int, int], update: int, types: bytes, *, candidate: bool) -> bool:
    """:param candidate: it is a release candidate, which may lack what the release has."""
    selective = _SELECTIVE in types if types else series >= SELECTIVE_KERNEL
    since_release = series > FIXED_KERNEL or (series == FIXED_KERNEL and not candidate)
    fixed = since_release or update >= FIXED_STABLE.get(series, update + 1) or _FIXED in types
    return selective and not fixed


def _types(system: Path) -> bytes:
    try:
        return (system / "sys/kernel/btf/kvm_amd").read_bytes()
    except OSError:
        return b""


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
    if context.typed and kernel_has_types(system / "dev/kvm"):
        return failed(
            "VM type",
            "made by KVM_SEV_INIT2: kernels so far move such a context, but the guest does not run afterwards",
            "start the guest with legacy-vm-type=on on its sev-guest object",
            restart=True,
        )
    return passed("VM type", "made by KVM_SEV_INIT")


def kernel_has_types(device: Path = Path("/dev/kvm")) -> bool:
    """Whether KVM makes VMs of a type of their own for SEV."""
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
