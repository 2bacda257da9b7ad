"""
SELinux, as far as a hop needs it: questions to the kernel about the policy that is loaded, and labels for what a QEMU
is given.

The kernel is asked by way of selinuxfs (security/selinux/selinuxfs.c), so the answers are those of the policy in force,
with the administrator's own modules. A socket, a pipe or a memfd has the label of the process that made it, which a
confined QEMU may not use. sevhop's policy module has a type for them, :data:`TYPE`; without the module, and without
SELinux, nothing is labelled.

References: selinux(8), setsockcreatecon(3), and the kernel's documentation of ``/proc/PID/attr``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import SevhopError

#: Where the kernel has it; without SELinux there is nothing.
KERNEL = Path("/sys/fs/selinux")
#: The type of what sevhop shares with a QEMU or with libvirt.
TYPE = "sevhop_run_t"
#: The extended attribute with the label of a file.
ATTRIBUTE = "security.selinux"
#: Attributes of a thread; sockets that it makes have the label that is written there.
_SOCKETS = Path("/proc/thread-self/attr/sockcreate")
_OWN = Path("/proc/thread-self/attr/current")
#: In what the kernel answers: the permissions that are granted, and flags. The first of those means that a domain is
#: permissive (security/selinux/include/security.h: AVD_FLAGS_PERMISSIVE).
_GRANTED, _FLAGS, _PERMISSIVE = 0, 5, 1
_ANSWER = 4096
#: Parts of a context: user, role, type and, where the policy has levels, a range of those.
_PARTS = 4


def enabled() -> bool:
    """Whether the kernel has a policy, be it enforced or not."""
    return (KERNEL / "enforce").exists()


def enforcing() -> bool:
    """Whether the policy is enforced."""
    with contextlib.suppress(OSError):
        return (KERNEL / "enforce").read_text().strip() == "1"
    return False


def context_of(process: int | str) -> str:
    """
    The context of a process.

    :raises OSError: it has exited.
    """
    return Path(f"/proc/{process}/attr/current").read_text().rstrip("\0\n")


def label_of(path: Path | int) -> str:
    """
    The label of a file.

    :raises OSError: it has none, or is not there.
    """
    return os.getxattr(path, ATTRIBUTE).rstrip(b"\0").decode()


def set_label(path: Path | int, label: str) -> None:
    """
    Label a file, or a descriptor of ours, unless it is.

    :raises OSError: the kernel does not let us.
    """
    if label_of(path) != label:
        os.setxattr(path, ATTRIBUTE, label.encode() + b"\0")


def is_context(confinement: str) -> bool:
    """Whether what confines a process (:attr:`.process.QemuProcess.confinement`) is a context of SELinux."""
    parts = confinement.split(":")
    return len(parts) >= _PARTS - 1 and all(parts[: _PARTS - 1]) and not confinement.endswith(")")


def context_in(confinement: str) -> str:
    """What confines a process, if that is a context of SELinux; otherwise empty."""
    return confinement if is_context(confinement) else ""


def type_of(context: str) -> str:
    """The type in a context; empty if this is none."""
    return context.split(":")[2] if is_context(context) else ""


def object_context(context: str, type_: str) -> str:
    """The label of a file or socket of this type, made for a process; of the lowest level, that all processes have."""
    user, _, _, *levels = context.split(":", _PARTS - 1)
    return ":".join([user, "object_r", type_, *(["s0"] if levels else [])])


def knows(context: str) -> bool:
    """Whether the policy has this context."""
    with contextlib.suppress(OSError):
        fd = os.open(KERNEL / "context", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, context.encode())
        finally:
            os.close(fd)
        return True
    return False


def ask(what: str, context: str, target: str, kind: str) -> str | None:
    """
    One question.

    :param what: a file of selinuxfs, such as ``access`` or ``create``.
    :param kind: class of the target.
    :return: the answer; None if the policy does not know that.
    """
    try:
        number = int((KERNEL / "class" / kind / "index").read_text())
        fd = os.open(KERNEL / what, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        os.write(fd, f"{context} {target} {number}".encode())
        return os.read(fd, _ANSWER).rstrip(b"\0\n").decode()
    except OSError:
        return None
    finally:
        os.close(fd)


def allows(context: str, target: str, kind: str, permissions: Iterable[str]) -> bool | None:
    """
    Whether a process with this context has these permissions; so has one whose domain is permissive.

    :return: None if the policy does not know the contexts or a permission.
    """
    if (answer := ask("access", context, target, kind)) is None:
        return None
    numbers = answer.split()
    try:
        wanted = sum(1 << int((KERNEL / "class" / kind / "perms" / one).read_text()) - 1 for one in permissions)
    except OSError:
        return None
    granted, flags = int(numbers[_GRANTED], 16), int(numbers[_FLAGS], 16)
    return bool(flags & _PERMISSIVE) or granted & wanted == wanted


def shared_label() -> str:
    """The label of what a QEMU is given; empty where there is no such type."""
    if not enabled():
        return ""
    try:
        label = object_context(_OWN.read_text().rstrip("\0\n"), TYPE)
    except (OSError, ValueError):
        return ""
    return label if knows(label) else ""


def share(file: int | Path) -> None:
    """
    Label a descriptor of ours, or a file, as one that is shared with a QEMU.

    :raises SevhopError: the kernel does not let us.
    """
    if not (label := shared_label()):
        return
    try:
        set_label(file, label)
    except OSError as err:
        what = "a descriptor" if isinstance(file, int) else str(file)
        raise SevhopError(f"cannot label {what} as {TYPE}: {err.strerror}", _HINT) from err


def copy_label(source: int, copy: int) -> None:
    """
    Label a copy of a file like that, where files have labels.

    :raises OSError: the kernel does not let us.
    """
    if enabled():
        os.setxattr(copy, ATTRIBUTE, os.getxattr(source, ATTRIBUTE))


@contextlib.contextmanager
def sharing_sockets() -> Iterator[None]:
    """
    Sockets that this thread makes in here are shared with a QEMU.

    :raises SevhopError: the kernel does not let us.
    """
    if not (label := shared_label()):
        yield
        return
    try:
        _write(_SOCKETS, label)
    except OSError as err:
        raise SevhopError(f"cannot make sockets with the label {TYPE}: {err.strerror}", _HINT) from err
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _write(_SOCKETS, "\n")  # the default


def _write(path: Path, text: str) -> None:
    """Without O_CREAT: the policy is asked for that even if the file exists, and what it denies is logged."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


_HINT = "run sevhop as root, in a domain that SELinux does not confine"
