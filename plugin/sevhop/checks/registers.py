"""
Whether all vCPU state of an SEV-ES guest can be taken to another QEMU.

The registers are encrypted, and the kernel moves them with the context, for as many vCPUs as were launched. Everything
else has to be in the device state, and QEMU from version 9.1 on saves it only while a flag is cleared
(:mod:`sevhop_qmp.protected_state`). Where that flag is depends on the build. So the source's own program is started
once more, with adopt.so and without a guest: a machine without processors, for which the launch of an SEV-ES guest is
emulated.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sevhop_qmp import adopt_library, exported
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.monitor import Commands
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.protected_state import ProtectedState, has_flag

from ..cancellation import shielded
from ..guest import emulator
from ..guest.inspection import Guest, SevContext
from ..keeper.handover import SourceHandles
from ..keeper.local import LocalKeeper
from ..process import dialogue, launch
from ..process.confinement import Confinement
from ..process.launch import Identity
from ..process.namespaces import within_namespaces_of
from ..process.scheduling import Thread
from .result import CheckResult, Status, failed, passed

#: Of a vCPU; its statistics (``kvm-vcpu-stats``) have a descriptor of their own in newer QEMUs.
_VCPU_LINK = "anon_inode:kvm-vcpu:"
_HINT = "shut the guest down and start it in another build of QEMU; and report this"
_CLEARED = "run: sevhop recover; if no hop of this guest is found, shut it down and start it again"
#: Bytes of the ``KVMState`` among which adopt.so looks for the flag (qmp_ext/adopt/protected_state.c).
_SEARCHED = 512
_MACHINE = ("-accel", "kvm", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio")
_COMMANDS = b'{"execute": "qmp_capabilities"} {"execute": "x-sev-adopt-status"} {"execute": "quit"}'

#: Build ID → offset of the flag, as far as this process has found it.
_offsets: dict[str, int] = {}


class Registers(NamedTuple):
    """
    What was found.

    :ivar result: of the test; None if the guest is no SEV-ES guest.
    :ivar flag: offset of the flag; 0 if the source has none.
    """

    result: CheckResult | None = None
    flag: int = 0


async def examine(guest: Guest, process: QemuProcess, monitor: Commands) -> Registers:
    """Test a guest; one without encrypted registers passes without a test."""
    if guest.context.kind != "sev-es":
        return Registers()
    if guest.context.typed:
        return Registers(CheckResult("registers", Status.SKIP))
    try:
        if found := await _against_vcpus(guest, process, monitor):
            return Registers(found)
        if not await asyncio.to_thread(has_flag, process, guest.version):
            return Registers(passed("registers", f"QEMU {guest.version} saves all vCPU state"))
        flag = await _offset(guest.context, process, monitor)
        with ProtectedState(process, flag) as state:
            value = state.protected()
    except SevhopError as err:
        return Registers(_failed(guest, err.message, err.hint or _HINT))
    if value != 1:
        reason = f"its flag guest_state_protected is {value}, not 1"
        return Registers(_failed(guest, reason, _CLEARED if value == 0 else _HINT))
    return Registers(passed("registers", "QEMU can save all vCPU state"), flag)


def _failed(guest: Guest, reason: str, hint: str) -> CheckResult:
    return failed("registers", f"cannot have QEMU {guest.version} save all vCPU state: {reason}", hint)


async def _against_vcpus(guest: Guest, process: QemuProcess, monitor: Commands) -> CheckResult | None:
    """The kernel compares the vCPUs of both VMs, and each must have been launched."""
    found = ""
    with protocol_errors(monitor.name):
        for cpu in await monitor.execute("query-cpus-fast"):
            if await monitor.execute("qom-get", {"path": cpu["qom-path"], "property": "hotplugged"}):
                found = f"vCPU {cpu['cpu-index']} was plugged after the launch, and no kernel moves it"
    in_kernel = {fd.target for fd in process.descriptors() if fd.target.startswith(_VCPU_LINK)}
    if len(in_kernel) != guest.vcpus:
        found = f"KVM has {len(in_kernel)} vCPUs, and the destination would have {guest.vcpus}: no kernel moves them"
    if not found:
        return None
    return failed("registers", found, "shut the guest down and start it with as many vCPUs as it is to have")


async def _offset(context: SevContext, process: QemuProcess, monitor: Commands) -> int:
    """
    The offset of the flag in the source.

    :raises SevhopError: it cannot be found.
    """
    build = exported.build_id(process)
    if build not in _offsets:
        offset = await _find(context, process, monitor)
        if not 0 < offset < _SEARCHED:
            raise SevhopError("it has a flag guest_state_protected that adopt.so does not find", _HINT)
        if not build:
            return offset
        _offsets[build] = offset
    return _offsets[build]


async def _find(context: SevContext, process: QemuProcess, monitor: Commands) -> int:
    """Start the source's program, and let it go through a launch. :raises SevhopError: that fails."""
    try:
        program = os.open(f"/proc/{process.pid}/exe", os.O_PATH | os.O_CLOEXEC)
    except OSError as err:
        raise SevhopError(f"its program cannot be started once more: {err.strerror}") from err
    try:
        with LocalKeeper(SourceHandles(None, {}), replace(context, handle=0, measurement="")) as keeper:
            # By its descriptor: the file may have been replaced, or may be in another mount namespace.
            command = [f"/proc/self/fd/{program}", *_MACHINE, *await _guest_options(context, monitor)]
            keep = [program, keeper.theirs.fileno()]
            output, errors = await shielded(
                asyncio.to_thread(_run, process, command, f"fd:{keeper.theirs.fileno()}", keep)
            )
    finally:
        os.close(program)
    return _parse(output, errors)


async def _guest_options(context: SevContext, monitor: Commands) -> list[str]:
    """The machine is an SEV-ES guest like the source's, with nothing else in it."""
    options = {"policy": str(context.policy), "sev-device": context.device}
    with protocol_errors(monitor.name):
        path = await monitor.execute("qom-get", {"path": "/machine", "property": "confidential-guest-support"})
        names = {str(row["name"]) for row in await monitor.execute("qom-list", {"path": path})}
        for name in ("cbitpos", "reduced-phys-bits"):
            options[name] = str(await monitor.execute("qom-get", {"path": path, "property": name}))
    if "legacy-vm-type" in names:
        options["legacy-vm-type"] = "on"
    described = ",".join(f"{name}={value.replace(',', ',,')}" for name, value in options.items())
    return ["-machine", "none,confidential-guest-support=sev", "-object", f"sev-guest,id=sev,{described}"]


def _run(process: QemuProcess, command: Sequence[str], keeper: str, keep: Sequence[int]) -> tuple[bytes, bytes]:
    """Run it as the source's user, with the devices that this one has."""
    try:
        with dialogue.questions(_COMMANDS) as stdin, _start(process, command, keeper, keep, stdin) as child:
            try:
                return dialogue.answers(child, emulator.PATIENCE)
            finally:
                child.kill()
    except subprocess.TimeoutExpired as err:
        raise SevhopError(f"no answer from its program within {emulator.PATIENCE:g} s", "try again") from err
    except (OSError, subprocess.SubprocessError) as err:
        raise SevhopError(f"cannot start its program: {getattr(err, 'strerror', None) or err}") from err


def _start(
    process: QemuProcess, command: Sequence[str], keeper: str, keep: Sequence[int], stdin: int
) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    if process.namespace("mnt") != os.readlink("/proc/self/ns/mnt"):
        return subprocess.Popen(
            [*within_namespaces_of(process), *command],
            # Nothing of the source's, which QEMU can change: root executes what enters the namespaces.
            cwd="/", env={"PATH": os.defpath, **adopt_library.environment(keeper)}, pass_fds=keep,
            stdin=stdin, stdout=pipe, stderr=pipe,
        )  # fmt: skip
    confinement = Confinement.of(process)._replace(label="", cgroups=())
    identity = Identity(confinement, Thread.of(process.pid))
    environment = launch.inheritable(process.environment)
    environment |= adopt_library.environment(keeper, inherited=environment)
    return launch.spawn(
        command, environment, identity, keep=keep, ends_with_us=True, stdin=stdin, stdout=pipe, stderr=pipe
    )


def _parse(output: bytes, errors: bytes) -> int:
    try:
        answers: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
        statuses = [answer["return"] for answer in answers if "protected-state-offset" in answer.get("return", ())]
        return int(statuses[0]["protected-state-offset"])
    except (ValueError, TypeError, AttributeError, LookupError) as err:
        lines = errors.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "no reason given"
        raise SevhopError(f"its program cannot be started once more: {reason}") from err
