"""What keeps libvirt from starting a domain again: made, and undone, while its guest runs."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.support.guests import counter
from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS, PROGRAMS

SECRET = "11111111-2222-3333-4444-555555555555"
LUKS = f"""<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{GUESTS}/encrypted.luks'>
    <encryption format='luks'><secret type='passphrase' uuid='{SECRET}'/></encryption></source>
    <target dev='vdb' bus='virtio'/></disk>"""
MEDIUM = """<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{}'>{}</source>
    <target dev='sda' bus='sata'/><readonly/></disk>"""
KEEPS_OWNER = "<seclabel model='dac' relabel='no'/>"
CLIENT = f"""<channel type='unix'><source mode='connect' path='{GUESTS}/server'/>
    <target type='virtio' name='org.example.channel'/></channel>"""
VOLUME = """<disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='pool' volume='volume'/>
    <target dev='vdb' bus='virtio'/></disk>"""
NETWORK = "<network><name>network</name><forward mode='bridge'/><bridge name='{}'/></network>"
LOGGED = f"<parallel type='file'><source path='{GUESTS}/logs/parallel' append='on'/></parallel>"
DEFINE_SECRET = f"""
    printf '%s' "<secret ephemeral='no' private='no'><uuid>{SECRET}</uuid></secret>" >/run/secret.xml
    virsh --quiet secret-define /run/secret.xml && virsh --quiet secret-set-value {SECRET} cGFzcw==
"""
SERVER = """
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
server.listen()
print(flush=True)
server.accept()[0].recv(1)
"""


@dataclass(frozen=True)
class Fault:
    """
    What is made while a guest runs.

    :ivar test: of ``check``, which fails for it.
    :ivar reason: a part of what it reports.
    :ivar domain: fields of the domain.
    :ivar make: makes it.
    :ivar mend: undoes that. None if the fault cannot come to be while the guest runs in a transit, or if libvirt starts
        the domain nevertheless.
    """

    test: str
    reason: str
    domain: dict[str, object]
    make: Callable[[Daemon, DomainGuest], object]
    mend: Callable[[Daemon, DomainGuest], object] | None = None


def shell(text: str) -> Callable[[Daemon, DomainGuest], object]:
    """A command in the place where the daemon is."""

    def run(daemon: Daemon, _: DomainGuest) -> None:
        done = daemon.run("sh", "-c", text)
        assert done.returncode == 0, done.stderr

    return run


def plug(**device: str) -> Callable[[Daemon, DomainGuest], object]:
    """A device that libvirt does not know of."""
    return lambda _, guest: guest.monitor("device_add", driver="usb-kbd", bus="usb.0", **device)


FIRMWARE = PROGRAMS / "firmware"
USB = "<controller type='usb' model='qemu-xhci'/>"
MEDIA = GUESTS / "media"
FAULTS = {
    "medium that QEMU's user cannot read": Fault(
        "files",
        f"cannot read {GUESTS}/disc.iso",
        {"more": MEDIUM.format(f"{GUESTS}/disc.iso", KEEPS_OWNER)},
        shell(f"chmod 600 {GUESTS}/disc.iso"),
        shell(f"chmod 644 {GUESTS}/disc.iso"),
    ),
    "directory that QEMU's user cannot search": Fault(
        "files",
        f"cannot reach {MEDIA}/disc.iso",
        {"more": MEDIUM.format(f"{MEDIA}/disc.iso", "")},
        shell(f"chmod 700 {MEDIA}"),
        shell(f"chmod 777 {MEDIA}"),
    ),
    "firmware that was removed": Fault(
        "files",
        f"firmware: {FIRMWARE}: No such file",
        {"firmware": FIRMWARE},
        shell(f"mv {FIRMWARE} {FIRMWARE}.away"),
        shell(f"mv {FIRMWARE}.away {FIRMWARE}"),
    ),
    "firmware that QEMU's user cannot read": Fault(
        "files",
        f"cannot read {FIRMWARE}",
        {"firmware": FIRMWARE},
        shell(f"chmod 600 {FIRMWARE}"),
        shell(f"chmod 644 {FIRMWARE}"),
    ),
    "flash that QEMU's user cannot read": Fault(
        "files", f"cannot read {FIRMWARE}", {"firmware": FIRMWARE, "pflash": True}, shell(f"chmod 600 {FIRMWARE}")
    ),
    "firmware of another size": Fault(
        "firmware size",
        f"{FIRMWARE} has 131072 bytes, and 65536 when",
        {"firmware": FIRMWARE},
        shell(f"cat {FIRMWARE} >>{FIRMWARE}.old; cp {FIRMWARE} {FIRMWARE}.old; cat {FIRMWARE}.old >>{FIRMWARE}"),
    ),
    "flash of another size": Fault(
        "firmware size",
        f"{FIRMWARE} has 131072 bytes, and 65536 when",
        {"firmware": FIRMWARE, "pflash": True},
        shell(f"cp {FIRMWARE} {FIRMWARE}.old; cat {FIRMWARE}.old >>{FIRMWARE}"),
    ),
    "log without a directory": Fault(
        "files",
        f"the directory of {GUESTS}/logs/parallel does not exist",
        {"more": LOGGED},
        shell(f"rm -r {GUESTS}/logs"),
        shell(f"mkdir -m 777 {GUESTS}/logs"),
    ),
    "server that has exited": Fault(
        "sockets",
        f"no process listens on {GUESTS}/server",
        {"more": CLIENT},
        lambda daemon, _: end_server(daemon),
        lambda daemon, _: start_server(daemon),
    ),
    "network that is not active": Fault(
        "networks",
        "network network is not active",
        {"interface": "<interface type='network'><source network='network'/><model type='virtio'/></interface>"},
        lambda daemon, _: daemon.virsh("net-destroy", "network"),
        lambda daemon, _: daemon.virsh("net-start", "network"),
    ),
    "bridge that was deleted": Fault(
        "networks",
        "there is no bridge gone",
        {"interface": "<interface type='bridge'><source bridge='gone'/><model type='virtio'/></interface>"},
        shell("ip link delete gone"),
        shell("ip link add gone type bridge && ip link set gone up"),
    ),
    "storage pool that is not active": Fault(
        "storage pools",
        "storage pool pool is not active",
        {"more": VOLUME},
        lambda daemon, _: daemon.virsh("pool-destroy", "pool"),
        lambda daemon, _: daemon.virsh("pool-start", "pool"),
    ),
    "secret that was undefined": Fault(
        "secrets",
        f"secret {SECRET}: ",
        {"more": LUKS},
        lambda daemon, _: daemon.virsh("secret-undefine", SECRET),
        shell(DEFINE_SECRET),
    ),
    "plugged device without an id": Fault(
        "plugged devices", "a device without an id (usb-kbd) was plugged", {"more": USB}, plug()
    ),
    "plugged device with an id": Fault(
        "plugged devices", "keyboard (usb-kbd) was plugged", {"more": USB}, plug(id="keyboard")
    ),
}


def start_server(daemon: Daemon) -> subprocess.Popen[str]:
    """The process at the other end of the channel."""
    server = daemon.start_command("sh", "-c", 'rm -f "$2"; exec python3 -c "$1" "$2"', "sh", SERVER, GUESTS / "server")
    assert server.stdout is not None
    server.stdout.readline()
    return server


def end_server(daemon: Daemon) -> None:
    """Kill the process at the other end of the channel."""
    for pid in daemon.with_arguments(f"{GUESTS}/server", "accept"):
        daemon.run("kill", "-9", str(pid))


@contextlib.contextmanager
def surroundings_of(daemon: Daemon) -> Iterator[None]:
    """What the domains need, in order."""
    done = daemon.run(
        "sh",
        "-ec",
        f"""
        rm -rf {GUESTS}/logs {MEDIA} {GUESTS}/pool
        mkdir -m 777 {GUESTS}/logs {MEDIA} {GUESTS}/pool
        for medium in {GUESTS}/disc.iso {MEDIA}/disc.iso; do truncate -s 1M $medium; chmod 644 $medium; done
        cp {counter.firmware(idle=True)} {FIRMWARE}
        chmod 644 {FIRMWARE}
        ip link add bridge type bridge
        ip link add gone type bridge
        ip link set bridge up
        ip link set gone up
        {DEFINE_SECRET}
        # QEMU measures how fast the processor hashes, and fails if that takes less than a tick of the kernel's clock.
        for _ in 1 2 3 4 5; do
            qemu-img create -q --object secret,id=s,data=pass -f luks -o key-secret=s,hash-alg=sha512,iter-time=100 \\
                {GUESTS}/encrypted.luks 4M && break
        done
        chmod 666 {GUESTS}/encrypted.luks
        virsh --quiet pool-define-as pool dir --target {GUESTS}/pool
        virsh --quiet pool-start pool
        virsh --quiet vol-create-as pool volume 1M
        printf '%s' "{NETWORK.format("bridge")}" >/run/network.xml
        virsh --quiet net-define /run/network.xml
        virsh --quiet net-start network
        """,
    )
    assert done.returncode == 0, done.stderr
    server = start_server(daemon)
    with contextlib.ExitStack() as stack:
        stack.callback(server.wait)
        stack.callback(end_server, daemon)
        yield
    daemon.run(
        "sh",
        "-c",
        f"""
        virsh net-destroy network; virsh net-undefine network; virsh pool-destroy pool; virsh pool-undefine pool
        virsh secret-undefine {SECRET}
        ip link delete bridge; ip link delete gone
        cd {GUESTS} && rm -r logs {MEDIA} pool server disc.iso encrypted.luks {FIRMWARE}*
        """,
    )
