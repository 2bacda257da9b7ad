"""
The package on a host with systemd: a Debian release that is booted, with libvirt as one of its units.

What a test runs is a unit of its own: when it ends, systemd kills what it has left.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sevhop.install import units

from tests.support.guests import apparmor, counter, linux
from tests.support.guests.booted import Booted
from tests.support.guests.build import ROOT, Unavailable
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.machine import Accelerator
from tests.support.guests.running import GuestFailed, wait_until

#: A host as its administrator has installed it. What is only recommended is not there, but for what guests are confined
#: and counted by.
HOST = (
    *("systemd", "systemd-sysv", "dbus", "systemd-container", "polkitd", "libvirt-daemon-system", "libvirt-clients"),
    *("qemu-system-x86", "qemu-utils", "seabios", "ipxe-qemu", "iproute2", "procps", "apparmor"),
    # What sevhop depends on: to install it takes minutes in emulation.
    *("python3-libvirt", "python3-tenacity"),
)
#: Debian 13 has it in another package.
_OF_SUITE = {"bookworm": ("libvirt-daemon-system-systemd",), "trixie": ()}
EMULATOR = Path("/usr/bin/qemu-system-x86_64")
#: In the SEV lab the processor is emulated, and there is no network to build the package with.
_LAB = "SEVHOP_LAB" in os.environ
_BUILT = "SEVHOP_PACKAGE"
OPTIONS = ("--timeout", "600") if _LAB else ()
#: Seconds.
PATIENCE = 1200.0 if _LAB else 60.0
#: Seconds; in the lab a test has half an hour in all.
_TWO_ATTEMPTS = 1200.0 if _LAB else 240.0
#: Five starts within ten seconds are too many for systemd; with its own minute a unit comes nowhere near that.
_OFTEN = "[Unit]\nStartLimitIntervalSec=0\n"
#: In emulation libvirt takes longer to start a QEMU than the unit gives it.
_PATIENT = (
    f"[Service]\nTimeoutStartSec=1h\nExecStart=\nExecStart=sevhop recover --unattended {' '.join(OPTIONS)}\n"
    if _LAB
    else ""
)
#: Drop-ins: no test waits for minutes. The last one is how long libvirt-guests waits for a guest that does not listen.
_SOON = {
    "sevhop-upgrade.timer": "[Timer]\nOnActiveSec=\nOnActiveSec=1s\nAccuracySec=1ms\n",
    "sevhop-recover.timer": f"{_OFTEN}[Timer]\nOnActiveSec=\nOnActiveSec=1s\nAccuracySec=1ms\n",
    "sevhop-recover.service": _OFTEN + _PATIENT,
}
#: In the lab AppArmor confines libvirt and its guests. Elsewhere others use the kernel that has its profiles.
_CONFINED = _LAB and apparmor.SECURITY.exists()
#: AppArmor's own unit does nothing in a container.
_APPARMOR = """\
[Unit]
Description=Load libvirt's profiles
Before=libvirtd.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=mount -t securityfs securityfs /sys/kernel/security
ExecStart=apparmor_parser --replace --skip-cache /etc/apparmor.d/usr.lib.libvirt.virt-aa-helper
ExecStart=apparmor_parser --replace --skip-cache /etc/apparmor.d/usr.sbin.libvirtd

[Install]
WantedBy=multi-user.target
"""
#: libvirt has each profile compiled several times, and that takes most of the time in emulation.
_COMPILED_QUICKLY = "Optimize=no-expr-simplify\nOptimize=no-minimize\n"
_GUESTS_AT_SHUTDOWN = "ON_BOOT=ignore\nON_SHUTDOWN=shutdown\nSHUTDOWN_TIMEOUT=2\n"


class Host(Daemon):
    """libvirt as a unit of a booted release."""

    def __init__(self, release: Booted) -> None:
        self.release = release

    def start_command(self, *command: str | Path, terminal: int | None = None) -> subprocess.Popen[str]:
        """Start a command as a unit."""
        return subprocess.Popen(
            self.release.as_unit(*command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def root(self) -> Path:
        """The file system as it looks in there."""
        return self.release.root

    @property
    def pid_of_libvirtd(self) -> int:
        """As it is numbered in there; 0 while it is not running."""
        return int(self.release.show("libvirtd.service", "MainPID"))

    def sevhop(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the installed sevhop, as a unit."""
        return self.run("sevhop", *words)

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """As a root shell that belongs to no unit."""
        return self.release.entered("systemctl", *words)

    def must(self, *words: str) -> None:
        """systemctl, which must succeed."""
        done = self.systemctl(*words)
        assert done.returncode == 0, done.stderr + self.log(
            "--identifier=sevhop", "--identifier=libvirtd", "--lines=100"
        )

    def log(self, *words: str) -> str:
        """What is in systemd's journal of this boot."""
        return self.release.entered("journalctl", "--no-pager", "--boot", *words).stdout

    def inhibitors(self) -> str:
        """As users see them."""
        return self.release.entered("systemd-inhibit", "--list", "--no-pager", "--no-legend").stdout

    def left_over(self) -> list[str]:
        """What hops have left behind, but for the program of a guest that was restored in its old emulator."""
        return [name for name in super().left_over() if not name.startswith("emulators")]

    def wait_until_recovered(self) -> None:
        """:raises GuestFailed: the units have not finished what was interrupted, also not in a second attempt."""
        try:
            wait_until(lambda: self.left_over() == [], _TWO_ATTEMPTS, "the hop has been finished")
        except GuestFailed as err:
            raise GuestFailed(f"{err}: {self.log('--unit=sevhop-recover.service', '--lines=100')}") from err

    def units(self, pattern: str) -> list[str]:
        """Names of the loaded units that match."""
        rows = self.systemctl("list-units", "--plain", "--no-legend", "--all", pattern).stdout.splitlines()
        return [row.split()[0] for row in rows]

    def leftover_units(self) -> list[str]:
        """Scopes of transits and keepers."""
        return self.units("sevhop-transit-*") + self.units("sevhop-keeper-*")

    def replace_emulator(self) -> None:
        """As a package does."""
        done = self.release.entered("sh", "-e", "-c", f"cp {EMULATOR} {EMULATOR}.new; mv {EMULATOR}.new {EMULATOR}")
        assert done.returncode == 0, done.stderr

    def boot(self) -> None:
        """Boot, and wait until libvirt answers."""
        self.release.boot()
        self.wait_until_it_answers()


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package: that in ``SEVHOP_PACKAGE``, or it is built."""
    if _BUILT in os.environ:
        return Path(os.environ[_BUILT])
    directory = tmp_path_factory.mktemp("package")
    done = subprocess.run([ROOT / "tools/package", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = directory.glob("sevhop_*.deb")
    return path


@pytest.fixture(scope="session", params=["bookworm", "trixie"])
def release(request: pytest.FixtureRequest) -> Iterator[Booted]:
    """A Debian 12, and a Debian 13; not booted yet."""
    suite: str = request.param
    try:
        release = Booted.start(suite, (*HOST, *_OF_SUITE[suite]), ())
    except Unavailable as err:
        pytest.skip(f"no Debian {suite}: {err}")
    try:
        yield release
    finally:
        release.stop()


@pytest.fixture(scope="session")
def installed(release: Booted, package: Path) -> Host:
    """Booted, and the package was installed then."""
    for unit, text in _SOON.items():
        directory = release.root / f"etc/systemd/system/{unit}.d"
        directory.mkdir(parents=True)
        (directory / "soon.conf").write_text(text)
    (release.root / "etc/default/libvirt-guests").write_text(_GUESTS_AT_SHUTDOWN)
    (release.root / "etc/default/sevhop").write_text(f'SEVHOP_UPGRADE_OPTIONS="{" ".join(OPTIONS)}"\n')
    guests = release.root / str(GUESTS).lstrip("/")
    guests.mkdir(parents=True)
    shutil.copyfile(counter.firmware(idle=not _LAB), guests / "counter.bin")
    shutil.copyfile(package, release.root / "root/package.deb")
    if _CONFINED:
        (release.root / "etc/apparmor/parser.conf").write_text(_COMPILED_QUICKLY)
        (release.root / "etc/systemd/system/profiles.service").write_text(_APPARMOR)
        release.must("systemctl", "enable", "--quiet", "profiles.service")
    host = Host(release)
    try:
        host.boot()
    except Unavailable as err:
        pytest.skip(str(err))
    release.install("/root/package.deb")
    host.install()
    return host


@pytest.fixture
def host(installed: Host) -> Iterator[Host]:
    """It is up, and nothing is left over."""
    if not installed.release.up:
        installed.boot()
    yield installed
    if installed.release.up:
        installed.systemctl("stop", "sevhop-upgrade.path", "sevhop-upgrade.timer", "sevhop-upgrade.service")
        installed.systemctl("reset-failed")


@contextmanager
def _domain(host: Host, description: Description) -> Iterator[DomainGuest]:
    """A domain until the end of the context. After that nothing is left of it, nor of a hop."""
    guest = DomainGuest.start(host, description)
    guest.wait_for_ticks()
    try:
        yield guest
    finally:
        if not host.release.up:
            host.boot()
        # Not two at a time, of which one would not wait for the other.
        host.systemctl("stop", *units.RECOVER, units.DELAY)
        host.sevhop("recover", guest.name)
        host.systemctl("start", units.RECOVER[-1])
        guest.end()
        for suffix in ("qcow2", "log", "xml"):
            guest.file(suffix).unlink(missing_ok=True)
    assert host.left_over() == []
    wait_until(lambda: host.leftover_units() == [], PATIENCE, "no unit of sevhop is left")
    assert "sevhop" not in host.inhibitors()


@pytest.fixture
def confined(host: Host) -> Host:
    """libvirt confines its guests by AppArmor."""
    if not _CONFINED:
        pytest.skip("AppArmor's profiles are the kernel's, which others use as well: in the lab only (tools/lab/run)")
    host.wait_until_it_answers()  # it exits when nobody needs it
    assert apparmor.confinement(host.pid_of_libvirtd, host.root) == "libvirtd (enforce)"
    return host


@pytest.fixture
def guest(host: Host, accelerator: Accelerator) -> Iterator[DomainGuest]:
    """A domain that counts."""
    with _domain(host, Description("web1", EMULATOR, accelerator, firmware=GUESTS / "counter.bin")) as guest:
        yield guest


@pytest.fixture
def linux_guest(host: Host) -> Iterator[DomainGuest]:
    """One that runs Linux, which shuts down when it is asked to."""
    try:
        images = linux.images()
    except Unavailable as err:
        pytest.skip(f"no Linux guest: {err}")
    inside = {}
    for name, path in (("unpacked", images.unpacked), ("initrd", images.initrd)):
        inside[name] = GUESTS / name
        shutil.copyfile(path, host.root / str(inside[name]).lstrip("/"))
    description = Description("web2", EMULATOR, "tcg", memory_mib=256, linux=replace(images, **inside))
    with _domain(host, description) as guest:
        yield guest
