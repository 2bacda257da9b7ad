"""
A program that applies the credentials of another process to itself, and then executes QEMU.

Started by :mod:`sevhop.process.launch`, by path and without the rest of sevhop. The credentials are a dictionary, as
:mod:`marshal` writes it, in the file whose descriptor is its only argument. It has no environment of its own: that of
the command comes from the QEMU that is replaced, which is not trusted, and this process is still root.

Each hop waits for it twice, so it imports little: with :mod:`json` and :mod:`signal`, which import :mod:`re` and
:mod:`enum`, it would take 21 ms instead of 13. Its parent is the same Python, so that it can read what that marshals.

Each step is skipped if nothing is to be changed, so that an ordinary user can do it for a QEMU of the same user.
The order is that of setpriv(1): what needs privileges comes first. One line on standard error reports what failed.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # at run time QEMU would be executed milliseconds later
    from collections.abc import Callable
    from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_THP_DISABLE = 41
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
_PR_SET_KEEPCAPS = 8
_SYS_CAPGET, _SYS_CAPSET = 125, 126
_SYS_IOPRIO_GET, _SYS_IOPRIO_SET = 252, 251
_CAPABILITY_VERSION_3 = 0x20080522
_PERSONALITY_QUERY = 0xFFFFFFFF
_SIGKILL = 9
_SIG_DFL = None
_SIG_SETMASK = 2
#: Number of signals, and bytes of a ``sigset_t`` of the C library.
_SIGNALS, _SIGNAL_SET = 64, 128

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _prctl(option: int, *arguments: int) -> None:
    padded = [*arguments, 0, 0, 0, 0][:4]
    _checked(_libc.prctl(option, *(ctypes.c_ulong(value) for value in padded)))


def _status() -> dict[str, str]:
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def _capabilities() -> list[int]:
    """Effective, permitted, inheritable."""
    status = _status()
    return [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh")]


def _set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    if [effective, permitted, inheritable] == _capabilities():
        return
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    halves = [[value >> shift & 0xFFFFFFFF for value in (effective, permitted, inheritable)] for shift in (0, 32)]
    data = struct.pack("=6I", *halves[0], *halves[1])
    _checked(_libc.syscall(_SYS_CAPSET, header, data))


def _write(path: str, text: str) -> None:
    # "w" would ask for the creation of a file, which SELinux logs as denied.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def _change(path: str, wanted: str) -> None:
    """Write to a file below /proc, unless it has that value already."""
    with open(path, encoding="ascii") as file:
        if file.read().strip() == wanted:
            return
    _write(path, wanted)


# -- the steps -------------------------------------------------------------------------------------


def _own_oom_score_adj(wanted: int) -> None:
    _change("/proc/self/oom_score_adj", str(wanted))


def _own_cgroups(groups: list[str]) -> None:
    for group in groups:
        try:
            _write(f"{group}/cgroup.procs", "0")
        except OSError as err:
            raise OSError(err.errno, f"{group}: {err.strerror}") from err


def _own_limits(limits: dict[int, tuple[int, int]]) -> None:
    for number, limit in limits.items():
        if resource.getrlimit(number) != limit:
            resource.setrlimit(number, limit)


def _own_affinity(processors: list[int]) -> None:
    if os.sched_getaffinity(0) != set(processors):
        os.sched_setaffinity(0, processors)


def _own_niceness(wanted: int) -> None:
    if os.getpriority(os.PRIO_PROCESS, 0) != wanted:
        os.setpriority(os.PRIO_PROCESS, 0, wanted)


def _own_io_priority(wanted: int) -> None:
    who_process = 1
    if _checked(_libc.syscall(_SYS_IOPRIO_GET, who_process, 0)) != wanted:
        _checked(_libc.syscall(_SYS_IOPRIO_SET, who_process, 0, wanted))


def _own_timer_slack(wanted: str) -> None:
    _change("/proc/self/timerslack_ns", wanted)


def _own_core_dump_filter(wanted: str) -> None:
    with open("/proc/self/coredump_filter", encoding="ascii") as file:
        if file.read().strip() == wanted:
            return
    _write("/proc/self/coredump_filter", f"0x{wanted}")


def _own_personality(wanted: int) -> None:
    if _checked(_libc.personality(ctypes.c_ulong(_PERSONALITY_QUERY))) != wanted:
        _checked(_libc.personality(ctypes.c_ulong(wanted)))


def _without_huge_pages(wanted: bool) -> None:
    if wanted and _status().get("THP_enabled") == "1":
        _prctl(_PR_SET_THP_DISABLE, 1)


def _enter_namespaces(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        _checked(_libc.setns(descriptor, 0))
        os.close(descriptor)


def _own_bounding_set(wanted: int, inheritable: int) -> None:
    """Also the inheritable set: it can only be extended before the bounding set is reduced."""
    effective, permitted, now = _capabilities()
    _set_capabilities(effective, permitted, now | inheritable & permitted)
    bounding = int(_status()["CapBnd"], 16)
    for capability in range(bounding.bit_length()):
        if (bounding & ~wanted) >> capability & 1:
            _prctl(_PR_CAPBSET_DROP, capability)


def _own_ids(uids: tuple[int, int, int], gids: tuple[int, int, int], groups: tuple[int, ...]) -> None:
    if sorted(map(int, _status()["Groups"].split())) != sorted(groups):
        os.setgroups(groups)
    if os.getresgid() != gids:
        os.setresgid(*gids)
    if os.getresuid() != uids:
        _prctl(_PR_SET_KEEPCAPS, 1)  # for the ambient set below; execve(2) clears it
        os.setresuid(*uids)


def _own_capabilities(inheritable: int, ambient: int, uid: int) -> None:
    """The other sets follow at execve(2) from these, and from the user (capabilities(7))."""
    if uid:
        _, permitted, _ = _capabilities()
        kept = permitted & (ambient | inheritable)
        _set_capabilities(kept, kept, inheritable)
    else:
        effective, permitted, _ = _capabilities()
        _set_capabilities(effective, permitted, inheritable)
    if int(_status().get("CapAmb", "0"), 16) == ambient:
        return
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(ambient.bit_length()):
        if ambient >> capability & 1:
            _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


def _own_label(label: str) -> None:
    path = "/proc/self/attr/exec"
    try:
        with open("/proc/self/attr/current", encoding="utf-8") as file:
            if file.read().rstrip("\0\n") == label:
                return
    except OSError:  # no security module has one
        pass
    # AppArmor requires a verb and the profile without its mode; SELinux the context alone.
    profile = label.rsplit(" (", 1)[0]
    text = f"exec {profile}" if label.endswith(")") else label
    _write(path, text)


def _no_new_privileges(wanted: bool) -> None:
    if wanted:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _end_with_parent(parent: int) -> None:
    """:raises SystemExit: that has exited before."""
    # With the thread that has started it; changing the user would have cancelled it.
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def _wait_at(gate: int) -> None:
    """
    Wait until the parent has put this process where it is to be.

    :raises SystemExit: the parent has exited.
    """
    if not os.read(gate, 1):
        raise SystemExit(1)
    os.close(gate)


#: What is applied: its name in messages, its key in the specification (None there: unchanged), and the step.
_STEPS: tuple[tuple[str, str, Callable[[dict[str, Any]], None]], ...] = (
    ("out-of-memory score", "oom_score_adj", lambda spec: _own_oom_score_adj(spec["oom_score_adj"])),
    ("cgroup", "cgroups", lambda spec: _own_cgroups(spec["cgroups"])),
    ("core dump filter", "core_dump_filter", lambda spec: _own_core_dump_filter(spec["core_dump_filter"])),
    ("personality", "personality", lambda spec: _own_personality(spec["personality"])),
    ("transparent huge pages", "without_huge_pages", lambda spec: _without_huge_pages(spec["without_huge_pages"])),
    ("CPU affinity", "affinity", lambda spec: _own_affinity(spec["affinity"])),
    ("niceness", "nice", lambda spec: _own_niceness(spec["nice"])),
    ("I/O priority", "io_priority", lambda spec: _own_io_priority(spec["io_priority"])),
    ("timer slack", "timer_slack", lambda spec: _own_timer_slack(spec["timer_slack"])),
    ("resource limits", "limits", lambda spec: _own_limits(spec["limits"])),
    ("namespaces", "namespaces", lambda spec: _enter_namespaces(spec["namespaces"])),
    ("working directory", "directory", lambda spec: os.fchdir(spec["directory"])),
    ("bounding set", "bounding", lambda spec: _own_bounding_set(spec["bounding"], spec["inheritable"])),
    ("security label", "label", lambda spec: _own_label(spec["label"])),
    ("user and groups", "uids", lambda spec: _own_ids(spec["uids"], spec["gids"], spec["groups"])),
    ("capabilities", "ambient", lambda spec: _own_capabilities(spec["inheritable"], spec["ambient"], spec["uids"][1])),
    ("no_new_privs", "no_new_privs", lambda spec: _no_new_privileges(spec["no_new_privs"])),
    ("end with the parent", "ends_with_parent", lambda spec: _end_with_parent(spec["ends_with_parent"])),
    ("cgroup", "gate", lambda spec: _wait_at(spec["gate"])),
)


def _reset_signals() -> None:
    """
    The executed program would inherit which signals are ignored, some of them by Python, and which are blocked: a QEMU
    that inherits a blocked SIGTERM cannot be shut down with it.
    """
    for number in range(1, _SIGNALS + 1):
        _libc.signal(number, _SIG_DFL)  # refused for SIGKILL and SIGSTOP, and those of the C library
    _checked(_libc.sigprocmask(_SIG_SETMASK, bytes(_SIGNAL_SET), None))


def main(spec: dict[str, Any]) -> None:
    """
    Apply it, and execute the command. Does not return.

    :raises SystemExit: a step or the execution failed; the message contains which, and why.
    """
    for name, key, step in _STEPS:
        if spec[key] is None:
            continue
        try:
            step(spec)
        except (OSError, ValueError) as err:
            reason = getattr(err, "strerror", None) or err
            raise SystemExit(f"sevhop: cannot apply the {name} of the old QEMU to the new one: {reason}") from err
    os.umask(spec["umask"])
    _reset_signals()
    command = [os.fsencode(argument) for argument in spec["command"]]
    environment = {os.fsencode(name): os.fsencode(value) for name, value in spec["environment"].items()}
    try:
        os.execve(command[0], command, environment)
    except OSError as err:
        raise SystemExit(f"cannot execute {spec['command'][0]}: {err.strerror}") from err


if __name__ == "__main__":
    # The descriptor is closed with the file.
    with open(int(sys.argv[1]), "rb") as given:
        specification = marshal.load(given)
    main(specification)
