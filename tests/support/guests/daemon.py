"""A libvirt daemon of one's own, and guests in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from xml.etree import ElementTree

from . import counter
from .build import Unavailable
from .enclosure import BESIDE, GUESTS
from .judge import Verdict, judge_files, judge_log
from .linux import GATEWAY, KERNEL_ARGUMENTS, LinuxImages, sev_firmware
from .machine import C_BIT, OVMF_CODE, OVMF_VARIABLES, Accelerator
from .release import Release, entered
from .running import PATIENCE, GuestFailed, wait_ended, wait_until

_PATIENCE = 60.0
_TIMEOUT = 1200
#: The context of a user's shell whom SELinux does not confine.
_USER = "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023"
_ENCLOSURE = Path(__file__).with_name("enclosure.py")
_DAEMONS = ("libvirtd", "virtqemud", *BESIDE)


class Daemon:
    """
    A daemon in a mount namespace and a network of its own, and commands run in there.

    :ivar pid: of the process that is its namespaces.
    """

    def __init__(
        self,
        process: subprocess.Popen[str],
        inside: Release | None,
        security: str = "none",
        name: Literal["libvirtd", "virtqemud"] = "libvirtd",
    ) -> None:
        self._process = process
        self._security = security
        self._inside = inside
        self._name = name
        self.pid = process.pid

    @classmethod
    def start(
        cls,
        *,
        security: Literal["none", "apparmor", "selinux"] = "none",
        inside: Release | None = None,
        modular: Path | None = None,
    ) -> Self:
        """
        Start one, and wait until it answers.

        :param security: what confines it and its guests. Only in the lab: it changes what the kernel does. With SELinux
            commands are run as from the shell of an unconfined user.
        :param inside: the daemon, the QEMU and the Python of that release.
        :param modular: virtqemud and the other modular daemons, in that directory, instead of libvirtd.
        """
        command = ["unshare", "--mount", "--net", "--propagation", "private"]
        if inside is None:
            command += [sys.executable, str(_ENCLOSURE)]
        else:
            command = entered(inside.pid, *command, "python3", "-c", _ENCLOSURE.read_text())
        command += [security] if modular is None else [security, f"virtqemud={modular}"]
        # What ends a whole group of processes is for us alone: it ends when its input does, and cleans up.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
            start_new_session=True,
        )
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise GuestFailed("the libvirt daemon did not start")
        self = cls(process, inside, security, "libvirtd" if modular is None else "virtqemud")
        self.wait_until_it_answers()
        if modular is not None:
            for name in BESIDE:
                self._wait_for("virsh", "-c", f"{name.removeprefix('virt').removesuffix('d')}:///system", "uri")
        return self

    @classmethod
    @contextlib.contextmanager
    def installed(cls, *, inside: Release | None = None, modular: Path | None = None) -> Iterator[Self]:
        """One with sevhop's hook, until the end of the context; see :meth:`start`."""
        daemon = cls.start(inside=inside, modular=modular)
        try:
            daemon.install()
            yield daemon
        finally:
            daemon.stop()

    def install(self) -> None:
        """``sevhop install``, which must succeed, however long the daemon probes the emulators here."""
        self.virsh("capabilities")
        done = self.sevhop("install")
        if done.returncode:
            raise GuestFailed(done.stderr)

    def stop(self) -> None:
        """End it, and everything that was started in it."""
        assert self._process.stdin is not None
        # A guest that a failed test has left in a transit is nobody's child, and neither is its keeper.
        left = []
        for pid in self._in_its_network():
            with contextlib.suppress(ProcessLookupError):
                left.append(os.pidfd_open(pid))
        self._process.stdin.close()
        self._process.wait(_PATIENCE)
        for pidfd in left:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)

    def restart(self) -> None:
        """Kill the daemon alone, and wait for the next one."""
        with self.gone():
            pass

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """Kill the daemon alone; the next one comes at the end."""
        os.kill(self.pid, signal.SIGSTOP)  # it would start the next one
        try:
            kill(self.pid_of_libvirtd)
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)
        self.wait_until_it_answers()

    def wait_until_it_answers(self) -> None:
        """Wait until there is a daemon, again."""
        self._wait_for("virsh", "list")

    def _wait_for(self, *command: str) -> None:
        wait_until(lambda: self.run(*command).returncode == 0, _PATIENCE, f"the libvirt daemon answers to {command}")

    @property
    def root(self) -> Path:
        """The file system as it looks in there."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def pid_of_libvirtd(self) -> int:
        """Of the daemon alone, libvirtd or virtqemud; a restarted one has another."""
        return int((self.root / f"run/{self._name}.pid").read_text())

    def start_command(self, *command: str | Path, terminal: int | None = None) -> subprocess.Popen[str]:
        """Start a command in there, perhaps on a terminal."""
        if self._inside is None:
            words = ["nsenter", "--mount", "--net", "--target", str(self.pid), "--"]
            words += ["runcon", _USER] if self._security == "selinux" else []
            words += map(str, command)
        else:
            words = entered(self.pid, *command)
        environment = _environment()
        if self._name == "virtqemud":
            # By itself virsh of Debian looks for libvirtd alone.
            environment["LIBVIRT_DEFAULT_URI"] = "qemu:///system"
        if terminal is not None:
            return subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal, text=True, env=environment)
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in there."""
        process = self.start_command(*command)
        out, err = process.communicate(timeout=_TIMEOUT)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def virsh(self, *words: str | Path) -> str:
        """Run virsh, which must succeed; what it prints."""
        done = self.run("virsh", "--quiet", *words)
        if done.returncode:
            raise GuestFailed(f"virsh {words[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    @contextlib.contextmanager
    def bridge(self) -> Iterator[str]:
        """A bridge in there, at which this side answers a Linux guest in place of the gateway; its name."""
        name = "sevhop-bridge"
        words = ["type", "bridge", "forward_delay", "0", "stp_state", "0"]
        for command in (
            ["link", "add", name, *words],
            ["address", "add", f"{GATEWAY}/24", "dev", name],
            ["link", "set", name, "up"],
        ):
            done = self.run("ip", *command)
            if done.returncode:
                raise Unavailable(f"no bridge can be had: {done.stderr.strip()}")
        try:
            yield name
        finally:
            self.run("ip", "link", "delete", name)

    def sevhop(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """
        Run sevhop: of this tree, or what is installed in the release. Unless a test limits them, steps may take longer
        than by default: the host may be busy.
        """
        command = [sys.executable, "-m", "sevhop.cli"] if self._inside is None else ["sevhop"]
        patient = words and words[0] in ("upgrade", "recover") and "--timeout" not in words
        return self.run(*command, *words, *(["--timeout", "30"] if patient else []))

    def upgrade(self, *words: str | Path) -> dict[str, Any]:
        """Upgrade one domain; what is reported."""
        done = self.sevhop("upgrade", "--json", *words)
        if not done.stdout:
            raise GuestFailed(f"sevhop upgrade has exited with {done.returncode}, and no report: {done.stderr}")
        report: dict[str, Any] = json.loads(done.stdout)["domains"][0]
        if report["outcome"] != "done":  # a test that fails by it shows why
            print(json.dumps(report, indent=2), done.stderr, file=sys.stderr)
        return report | {"status": done.returncode}

    def recover(self, *words: str | Path) -> dict[str, Any]:
        """Recover all guests, or those of these names; what is reported, and the exit status."""
        done = self.sevhop("recover", "--json", *words)
        if not done.stdout or done.stderr:
            raise GuestFailed(f"sevhop recover has exited with {done.returncode}: {done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer | {"status": done.returncode}

    def recover_one(self, *words: str | Path) -> dict[str, Any]:
        """
        As :meth:`recover`, of the only guest. Its line for people may differ on a busy host: it has a guest that was
        stopped for long.
        """
        answer = self.recover(*words)
        (one,) = answer["guests"]
        return {**one, "status": answer["status"]}

    def left_over(self) -> list[str]:
        """What hops have left behind in there."""
        names = set()
        for root in (self.root / "run/sevhop", self.root / "var/lib/sevhop"):
            for directory, directories, files in os.walk(root):  # what vanishes meanwhile is omitted
                names |= {os.path.relpath(os.path.join(directory, name), root) for name in (*directories, *files)}
        return sorted(names - {"domains", "reboot", "journal", "hook-verified"})

    def _in_its_network(self) -> list[int]:
        """All processes in there. QEMUs have mount namespaces of their own."""
        own = os.readlink(f"/proc/{self.pid}/ns/net")
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns/net") == own:
                    found.append(int(entry.name))
        return found

    def processes(self) -> list[int]:
        """All processes in its namespace but daemons, of which a restarted one is another process."""
        own = os.readlink(f"/proc/{self.pid}/ns/mnt")
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                here = entry.name.isdigit() and os.readlink(entry / "ns/mnt") == own
                if here and (entry / "comm").read_text().strip() not in _DAEMONS:
                    found.append(int(entry.name))
        return found

    def named(self, *names: str) -> list[int]:
        """Those of the processes that have one of these names, as far as they are still there."""
        return [pid for pid in self.processes() if process_file(pid, "comm").decode().strip() in names]

    def with_arguments(self, *arguments: str) -> list[int]:
        """Those of the processes that have all of these on their command line, as far as they are still there."""
        return [
            pid
            for pid in self.processes()
            if (line := process_file(pid, "cmdline")) and all(argument.encode() in line for argument in arguments)
        ]


def process_file(pid: int, file: str) -> bytes:
    """A file of a process in /proc; nothing of one that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/{file}").read_bytes()
    return b""


@dataclass(frozen=True)
class Description:
    """
    A domain with a disk and a network card, that runs a bare-metal counter or Linux.

    :ivar memory: shared in a memfd, of huge pages if wanted, or in a file; or private.
    :ivar vcpus: their number.
    :ivar firmware: the counter; the one that is idle mostly by default.
    :ivar pflash: it is in flash, with variables beside it, as a UEFI is.
    :ivar cpu: the element; a plain one by default.
    :ivar sev: encrypted, as the SEV lab wants it. Its virtio devices reach only what the guest lends them, and its UEFI
        is one that knows encryption.
    :ivar policy: of the encrypted guest, see :mod:`tests.lab.contract.sev`.
    :ivar launch: what its owner has prepared for its launch, in XML.
    :ivar balloon: the model of its balloon.
    :ivar interface: its network card, in XML, or one on QEMU's user network.
    :ivar more: further devices, in XML.
    :ivar elements: further elements of the domain, in XML.
    :ivar linux: instead of the counter.
    :ivar uefi: Linux is started by OVMF, with variables of its own.
    :ivar serial: ``file``, or a ``pty`` for the console; what the guest prints is in its log in any case.
    :ivar append: whether libvirt leaves the log as it is when it starts the domain. By default it empties it.
    """

    name: str
    emulator: Path
    accelerator: Accelerator
    memory_mib: int = 64
    vcpus: int = 1
    memory: Literal["memfd", "huge", "file", "private"] = "memfd"
    firmware: Path | None = None
    pflash: bool = False
    cpu: str = ""
    sev: bool = False
    policy: int = 0
    launch: str = ""
    balloon: str = "none"
    interface: str = ""
    more: str = ""
    elements: str = ""
    linux: LinuxImages | None = None
    uefi: bool = False
    serial: Literal["file", "pty"] = "file"
    append: bool = True

    def xml(self) -> str:
        """For ``virsh define``."""
        huge = "<hugepages><page size='2' unit='MiB'/></hugepages>" if self.memory == "huge" else ""
        source = "memfd" if huge else self.memory
        backing = f"<memoryBacking>{huge}<source type='{source}'/><access mode='shared'/></memoryBacking>"
        model = "EPYC" if self.sev else "qemu64"
        cpu = f"<cpu mode='custom' match='exact' check='none'><model fallback='allow'>{model}</model></cpu>"
        policy = f"<cbitpos>{C_BIT}</cbitpos><reducedPhysBits>1</reducedPhysBits><policy>{self.policy:#06x}</policy>"
        sev = f"<launchSecurity type='sev'>{policy}{self.launch}</launchSecurity>"
        iommu = " iommu='on'" if self.sev else ""
        driver = "<driver iommu='on'/>" if self.sev else ""
        interface = f"<interface type='user'><model type='virtio'/>{driver}</interface>"
        return f"""<domain type='{"kvm" if self.accelerator == "kvm" else "qemu"}'>
  <name>{self.name}</name>
  <metadata><x:note xmlns:x='http://example.org/note'>keep &amp; this</x:note></metadata>
  <memory unit='MiB'>{self.memory_mib}</memory><vcpu>{self.vcpus}</vcpu>
  {backing if self.memory != "private" else ""}
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    {self._boot()}</os>
  <features><acpi/></features>
  {self.cpu or cpu}
  <devices>
    <emulator>{self.emulator}</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'{iommu}/>
      <source file='{GUESTS}/{self.name}.qcow2'/><target dev='vda' bus='virtio'/></disk>
    {self.interface or interface}
    {self._serial()}
    <memballoon model='{self.balloon}'/>
    {self.more}
  </devices>
  {sev if self.sev else ""}
  {self.elements}
</domain>"""

    def _boot(self) -> str:
        if self.linux is not None:
            image = self.linux.kernel if self.uefi else self.linux.unpacked
            kernel = f"<kernel>{image}</kernel><initrd>{self.linux.initrd}</initrd>"
            kernel += f"<cmdline>{KERNEL_ARGUMENTS}</cmdline>"
            if self.uefi:
                code, template = sev_firmware() if self.sev else (OVMF_CODE, OVMF_VARIABLES)
                kernel += f"<loader readonly='yes' type='pflash'>{code}</loader>"
                kernel += f"<nvram template='{template}'>{GUESTS}/{self.name}.fd</nvram>"
            return kernel
        loader = f"<loader readonly='yes' type='rom'>{self.firmware or counter.firmware(idle=True)}</loader>"
        if self.pflash:
            variables = f"<nvram template='{counter.firmware()}'>{GUESTS}/{self.name}.fd</nvram>"
            loader = loader.replace("'rom'", "'pflash'") + variables
        return loader

    def _serial(self) -> str:
        path = f"'{GUESTS}/{self.name}.log'" + (" append='on'" if self.append else "")
        if self.serial == "pty":
            return f"<serial type='pty'><log file={path}/></serial>"
        return f"<serial type='file'><source path={path}/></serial>"


class DomainGuest:
    """A domain that runs, from :meth:`start` to :meth:`end`."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.daemon = daemon
        self.name = name

    @classmethod
    def start(cls, daemon: Daemon, description: Description, *options: str) -> Self:
        """Define it and start it."""
        self = cls(daemon, description.name)
        daemon.virsh("define", self._make_files(description))
        daemon.virsh("start", self.name, *options)
        return self

    @classmethod
    def create(cls, daemon: Daemon, description: Description) -> Self:
        """Start it as a transient domain: libvirt forgets it when it ends."""
        self = cls(daemon, description.name)
        daemon.virsh("create", self._make_files(description))
        return self

    def _make_files(self, description: Description) -> Path:
        self.file("xml").write_text(description.xml())
        self.file("log").unlink(missing_ok=True)  # of an earlier guest of this name
        disk = GUESTS / f"{self.name}.qcow2"
        assert self.daemon.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "16M").returncode == 0
        return GUESTS / f"{self.name}.xml"

    def file(self, suffix: str) -> Path:
        """One of its files, as it is called from here."""
        return self.daemon.root / str(GUESTS).lstrip("/") / f"{self.name}.{suffix}"

    def end(self) -> None:
        """Destroy and undefine it."""
        self.daemon.run("virsh", "destroy", self.name)
        self.daemon.run("virsh", "undefine", "--nvram", self.name)

    @property
    def pid(self) -> int:
        """Of its QEMU."""
        return int((self.daemon.root / f"run/libvirt/qemu/{self.name}.pid").read_text())

    @property
    def state(self) -> str:
        """As virsh reports it."""
        return self.daemon.virsh("domstate", self.name)

    def xml(self, *options: str) -> str:
        """As virsh reports it."""
        return self.daemon.virsh("dumpxml", self.name, *options)

    def emulator(self, *options: str) -> str:
        """The emulator in its XML."""
        return ElementTree.fromstring(self.xml(*options)).findtext("devices/emulator", "")

    def monitor(self, command: str, **arguments: object) -> Any:
        """Run a QMP command by way of libvirt."""
        text = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(self.daemon.virsh("qemu-monitor-command", self.name, text))

    def seen(self) -> Verdict:
        """What its serial log contains so far."""
        path = self.file("log")
        return judge_log(path.read_text(encoding="ascii", errors="replace") if path.exists() else "")

    def judge(self, disk: Path | None = None) -> Verdict:
        """
        What has become of it, now that it is off: its log and its disk.

        :param disk: the image that it had last, if that is not its first.
        """
        if disk is None:
            return judge_files(self.file("log"), self.file("qcow2"))
        # What is below a snapshot is found in there only.
        checked = self.daemon.run("qemu-img", "check", disk)
        self.daemon.run("qemu-img", "convert", "-O", "qcow2", disk, GUESTS / f"{self.name}.whole")
        verdict = judge_files(self.file("log"), self.file("whole"))
        if checked.returncode:
            verdict.disk_errors += 1
            verdict.remarks.append(f"{disk}: {checked.stdout.strip()} {checked.stderr.strip()}")
        return verdict

    def wait_for_ticks(self, more: int = 10, timeout: float = PATIENCE) -> Verdict:
        """Wait until it has counted on, without a missing tick since its start. :param timeout: seconds."""
        wanted = self.seen().ticks + more
        wait_until(lambda: self.seen().ticks >= wanted, timeout, f"{more} more ticks")
        verdict = self.seen()
        if not verdict.unharmed:
            raise GuestFailed(str(verdict))
        return verdict


def _environment() -> dict[str, str]:
    """
    Our own, without what makes libvirt's programs connect elsewhere, write logs, or speak another language, and without
    a directory for temporary files that its guests' user may not enter.
    """
    ours = ("LIBVIRT_", "VIRSH_", "LC_", "TMPDIR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"LC_ALL": "C.UTF-8"}


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal, and if it is SIGKILL wait until the process has ended."""
    os.kill(pid, number)
    if number == signal.SIGKILL:
        assert wait_ended(pid, 10)
