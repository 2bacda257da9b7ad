"""The kernels that the lab can boot: Debian's own builds, downloaded and unpacked, never installed.

A kernel is named by its series ("6.1"). Which version that is today is determined by Debian's metapackage, at the first
use; it is then kept in the cache. Remove the series' directory there to get a newer one.
"""

from __future__ import annotations

import fcntl
import lzma
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.guests import build

from .errors import LabError

#: The lab's part of the cache.
CACHE = build.CACHE / "lab"

# Since Linux 6.19 the image, the modules and their lists are in packages of their own.
_PACKAGES = "linux-(base|binary|image|modules)-[0-9].*|busybox-static"


@dataclass(frozen=True)
class Series:
    """Where a kernel series comes from.

    :param suite: the Debian suite.
    :param metapackage: what follows "linux-image-" in the metapackage's name.
    """

    suite: str
    metapackage: str


SERIES = {
    "6.1": Series("bookworm", "amd64"),
    "6.12": Series("bookworm", "6.12-amd64"),
    # Debian's newest, whatever it is today.
    "sid": Series("sid", "amd64"),
}
DEFAULT = "6.1"


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel.

    :param series: its key in SERIES.
    :param release: what uname -r prints, such as "6.1.0-56-amd64".
    :param root: the directory that the packages were unpacked into.
    """

    series: str
    release: str
    root: Path

    @property
    def image(self) -> Path:
        """What to boot: the kernel as an ELF file if it could be decompressed, else as it is in the package."""
        elf = self.root / "boot" / "vmlinux"
        return elf if elf.exists() else self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        return self.root / "lib" / "modules" / self.release

    @property
    def busybox(self) -> Path:
        return self.root / "bin" / "busybox"

    @property
    def workshop(self) -> Path:
        """Where things made for this kernel are kept."""
        return self.root.parent


@contextmanager
def locked(series: str) -> Iterator[None]:
    """Hold the cache of one series, so that of several labs that start at once one fetches and builds."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{series}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def obtain(series: str) -> Kernel:
    """The kernel of this series from the cache, fetched first if it is not there. Call it in `locked`.

    :raise LabError: the packages are not to be had.
    """
    root = CACHE / series / "root"
    if not root.exists():
        _fetch(SERIES[series], root)
    images = sorted((root / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise LabError(f"{root}/boot should have one kernel, has {len(images)}; remove {root} and try again")
    return Kernel(series, images[0].name.removeprefix("vmlinuz-"), root)


def _fetch(series: Series, root: Path) -> None:
    """Download and unpack; `root` appears complete or not at all."""
    partial = root.with_name("root.partial")
    shutil.rmtree(partial, ignore_errors=True)
    names = (f"linux-image-{series.metapackage}", "busybox-static")
    fetch = [str(build.ROOT / "tools" / "fetch-packages"), "--only", _PACKAGES, series.suite, str(partial), *names]
    done = subprocess.run(fetch, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise LabError("the kernel's packages could not be fetched", done.stderr)
    _arrange(partial)
    for image in (partial / "boot").glob("vmlinuz-*"):
        _decompress(image, image.with_name("vmlinux"))
    partial.rename(root)


def _arrange(root: Path) -> None:
    """Have everything where Debian 12 has it: later packages have it all below /usr, the image beside the modules."""
    for directory in ("bin", "lib"):
        if not (root / directory).exists():
            (root / "usr" / directory).rename(root / directory)
    (root / "boot").mkdir(exist_ok=True)
    for image in (root / "lib" / "modules").glob("*/vmlinuz"):
        image.rename(root / "boot" / f"vmlinuz-{image.parent.name}")


def _decompress(image: Path, elf: Path) -> None:
    """Take the kernel out of its self-extracting image: done by the lab's emulated processor it takes up to 6 s.

    The image's layout is in the kernel's Documentation/arch/x86/boot.rst. Without a program for the compression in
    use nothing is written.
    """
    data = image.read_bytes()
    setup_sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = data[start : start + length - 4]  # the last four bytes are the decompressed size
    if payload.startswith(b"\xfd7zXZ\0"):
        elf.write_bytes(lzma.decompress(payload))
    elif payload.startswith(b"\x28\xb5\x2f\xfd") and shutil.which("zstd"):
        with open(elf, "wb") as file:
            subprocess.run(["zstd", "--quiet", "--decompress", "--stdout"], input=payload, stdout=file, check=True)
