"""A program in the namespaces of a QEMU: with its devices, as its user, and without a network."""

from __future__ import annotations

from sevhop_qmp.process import QemuProcess

#: Programs that are needed for that.
PROGRAMS = ("nsenter", "unshare", "setpriv")


def within_namespaces_of(source: QemuProcess) -> list[str]:
    """
    Command prefix: in the source's mount namespace, without a network, as the source's user. It is killed when we exit.

    ``/dev`` is the domain's own under libvirt, with those devices in it that this user may use.
    """
    identity = source.credentials
    groups = f"--groups={','.join(map(str, identity.groups))}" if identity.groups else "--clear-groups"
    return [
        *("nsenter", f"--mount=/proc/{source.pid}/ns/mnt", "--"),
        *("unshare", "--net", "--"),
        *("setpriv", f"--reuid={identity.uid}", f"--regid={identity.gid}", groups, "--pdeathsig=KILL", "--"),
    ]
