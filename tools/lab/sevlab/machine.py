"""The emulated machine: started, listened to, ended."""

from __future__ import annotations

import collections
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.guests import build

from . import initramfs, wire
from .errors import LabError, LabTimeout
from .kernels import Kernel
from .selinux import Policy

BOOT_LIMIT = 300.0  # seconds; it takes about 5 on an idle machine, and several labs at once share processors
CONSOLE_LINES = 60

# The processor of tools/lab/processor has SEV if its leaves of CPUID reach that of encryption. KVM asks for the other
# features before it offers SEV. The C-bit is the highest of 48 address bits. One thread for all processors: with one
# each, the emulation of nested guests has hung and crashed.
_CPU = "EPYC,phys-bits=48,xlevel=0x8000001f,+svm,+npt,+nrip-save,+decodeassists,+flushbyasid,+lbrv,+vgif"
_MACHINE = f"-machine q35 -accel tcg,thread=single -cpu {_CPU} -nodefaults -no-user-config -display none"
# Firmware images are no part of the emulator: Debian has them in packages of their own.
_FIRMWARE = "-L /usr/share/seabios -L /usr/share/qemu"
# The emulator keeps what it has translated by address, so that programs start twice as fast if theirs do not change
# (norandmaps). A kernel that panics ends the machine (with -no-reboot).
_KERNEL = (
    "console=ttyS0 quiet loglevel=4 panic=-1 norandmaps nokaslr mitigations=off cryptomgr.notests "
    "tsc=reliable no_timer_check random.trust_cpu=on"
)
# What the emulator always prints, to stderr.
_EXPECTED = "warning: TCG doesn't support requested feature"
# Directories whose contents the lab does not see (see the script init), and their modes: what belongs to the running
# machine, and what its libvirt and sevhop keep.
_EMPTY = {
    **dict.fromkeys(("/tmp", "/var/tmp"), "1777"),
    **dict.fromkeys(("/run", "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"), "755"),
    "/var/lib/sevhop": "700",
}

Sink = Callable[[bytes], None]


@dataclass(frozen=True)
class Lab:
    """One run of the lab.

    :param emulator: from `emulator.obtain`.
    :param kernel: what it boots.
    :param memory: its size in MiB.
    :param processors: their number.
    :param encrypt: guests' memory is kept encrypted, which is slow.
    :param policy: of SELinux, which is loaded and not enforced; without one there is AppArmor.
    :param shown: directories of the machine that are visible in the lab although they lie in one that is not.
    """

    emulator: Path
    kernel: Kernel
    memory: int
    processors: int
    encrypt: bool = False
    shown: tuple[Path, ...] = ()
    policy: Policy | None = None


@dataclass
class _Console:
    """The last lines of the kernel's console: the only witness when the lab dies."""

    lines: collections.deque[bytes] = field(default_factory=lambda: collections.deque(maxlen=CONSOLE_LINES))
    rest: bytes = b""

    def feed(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.lines.extend(lines)

    def text(self) -> str:
        return b"\n".join([*self.lines, self.rest]).decode(errors="replace").replace("\r", "")


def run(lab: Lab, base: bytes, job: wire.Job, timeout: float, out: Sink, err: Sink) -> int:
    """Boot, run one command, end the machine.

    :param base: from `initramfs.base`.
    :param timeout: seconds for all of it.
    :param out: gets what the command writes to stdout as it is written; `err`: the same of stderr.
    :return: the command's exit status as a shell sees it.
    :raise LabError: the machine did not come up or died; the output of the console is in it.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        console, console_far = (stack.enter_context(end) for end in socket.socketpair())
        port, port_far = (stack.enter_context(end) for end in socket.socketpair())
        initrd = stack.enter_context(_memory_file("initrd", base + _instructions(lab, job)))
        complaints = stack.enter_context(_memory_file("stderr", b""))
        inherited = (initrd, console_far.fileno(), port_far.fileno())
        emulator = stack.enter_context(_emulator(_command(lab, *inherited), complaints, inherited))
        console_far.close()
        port_far.close()

        receiver, witness, up = wire.Receiver(), _Console(), False

        def died(reason: str) -> LabError:
            said = os.pread(complaints, 1 << 16, 0).decode(errors="replace").splitlines()
            said = [line for line in said if _EXPECTED not in line]
            return LabError(reason, "\n".join([witness.text(), *said]))

        selector = stack.enter_context(selectors.DefaultSelector())
        for end in (console, port):
            end.setblocking(False)
            selector.register(end, selectors.EVENT_READ)
        while True:
            limit = timeout if up else min(timeout, BOOT_LIMIT)
            left = started + limit - time.monotonic()
            if left <= 0 and limit == timeout:
                raise LabTimeout(f"the time limit of {timeout:g} s is over", witness.text())
            if left <= 0:
                raise died(f"the lab was not up after {BOOT_LIMIT:g} s")
            ready = {key.fileobj for key, _ in selector.select(left)}
            if console in ready:
                witness.feed(_receive(console))
            if port not in ready:
                continue
            data = _receive(port)
            if not data:
                with suppress(subprocess.TimeoutExpired):
                    emulator.wait(5)
                witness.feed(_receive(console))
                raise died("the lab died" if up else "the lab did not come up")
            for kind, payload in receiver.feed(data):
                match kind:
                    case wire.UP:
                        up = True
                    case wire.OUT:
                        out(payload)
                    case wire.ERR:
                        err(payload)
                    case wire.EXIT:
                        return int(payload)
                    case _:
                        raise died(f"the lab failed: {payload.decode(errors='replace')}")


def _receive(end: socket.socket) -> bytes:
    """What is there; nothing if the other side is gone or sends nothing."""
    try:
        return end.recv(1 << 18)
    except (BlockingIOError, ConnectionResetError):
        return b""


def _command(lab: Lab, initrd: int, console: int, port: int) -> list[str]:
    kernel = f"{_KERNEL} security=selinux enforcing=0" if lab.policy else _KERNEL
    return [
        str(lab.emulator), *_MACHINE.split(), *_FIRMWARE.split(), "-no-reboot",
        "-device", f"sev-psp,encrypt={'on' if lab.encrypt else 'off'}",
        "-m", str(lab.memory), "-smp", str(lab.processors),
        "-kernel", str(lab.kernel.image), "-initrd", f"/dev/fd/{initrd}", "-append", kernel,
        "-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console",
        "-chardev", f"socket,id=port,fd={port}",
        "-device", "virtio-serial-pci,max_ports=2", "-device", "virtserialport,nr=1,chardev=port,name=lab",
        "-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=root,mount_tag=root",
    ]  # fmt: skip


def _instructions(lab: Lab, job: wire.Job) -> bytes:
    """The part of the first file system that is for this run only."""
    empty = _EMPTY | dict.fromkeys(_temporary(), "1777")
    needed = (build.ROOT, build.CACHE, Path(job.directory), Path(sys.prefix), Path(sys.base_prefix), *lab.shown)
    return initramfs.archive(
        {
            "run/job": (0o600, job.to_bytes()),
            "run/empty": (0o600, "".join(f"{mode} {path}\n" for path, mode in empty.items()).encode()),
            "run/shown": (0o600, "".join(f"{path}\n" for path in _hidden(needed, empty)).encode()),
            "run/stage": (0o600, f"{sys.executable}\n{Path(__file__).with_name('inside.py')}\n".encode()),
        }
        | (_policy(lab.policy) if lab.policy else {})
    )


def _policy(policy: Policy) -> dict[str, tuple[int, bytes]]:
    return {"run/policy": (0o600, policy.binary), "run/selinux": (0o600, f"{policy.root}\n".encode())}


def _temporary() -> list[str]:
    """Where programs that run now have their files, if it is in none of the usual places."""
    path = Path(tempfile.gettempdir()).resolve()
    return [] if any(Path(top) in (path, *path.parents) for top in _EMPTY) or path == Path("/") else [str(path)]


def _hidden(paths: tuple[Path, ...], empty: Iterable[str]) -> list[Path]:
    """Those of the directories that lie in an empty one, without those that lie in another one of them."""
    tops = set(map(Path, empty))
    inside = sorted({path.resolve() for path in paths if tops.intersection((path.resolve(), *path.resolve().parents))})
    return [path for path in inside if not any(other in path.parents for other in inside)]


@contextmanager
def _memory_file(name: str, contents: bytes) -> Iterator[int]:
    """A file without a name: nothing of it can be left behind."""
    descriptor = os.memfd_create(name)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(contents)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _emulator(command: list[str], stderr: int, descriptors: tuple[int, ...]) -> Iterator[subprocess.Popen[bytes]]:
    """The emulator's process, which does not outlive the block, nor this process, however that ends."""
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def end_with_parent() -> None:
        set_parent_death_signal = 1
        libc.prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=descriptors,
        process_group=0,
        preexec_fn=end_with_parent,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
