"""The first file system of the lab: busybox, the kernel modules that the lab needs, and /init.

It is made of two archives that the kernel unpacks one over the other: one that is the same for all runs with a
kernel and is kept in the cache, and a small one with what this run is to do (`archive`).
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import LabError
from .kernels import Kernel

INIT = Path(__file__).resolve().parents[1] / "init"

# In the order of loading; what they depend on is found and loaded before them. 9p and overlay make the root file
# system, virtio_console carries input and output. kvm-amd looks for the security processor when it is loaded, so that
# its driver comes first. Bridges, taps and vhost-net are for domains of libvirt.
MODULES = (
    *("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "ccp", "kvm-amd"),
    *("bridge", "tun", "vhost_net"),
)
OPTIONS = {"kvm-amd": "sev=1 sev_es=1"}


def base(kernel: Kernel) -> bytes:
    """The archive that all runs with this kernel have in common, from the cache or newly built.

    Call it in `kernels.locked`.

    :raise LabError: the kernel lacks a module.
    """
    ingredients = [INIT, Path(__file__)]
    digest = hashlib.sha256((kernel.root / "packages").read_bytes())
    for file in ingredients:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    kept = kernel.workshop / f"initramfs.{digest.hexdigest()[:16]}"
    if not kept.exists():
        contents = _build(kernel)
        for outdated in kernel.workshop.glob("initramfs.*"):
            outdated.unlink()
        partial = kernel.workshop / "initramfs.partial"
        partial.write_bytes(contents)
        partial.rename(kept)
    return kept.read_bytes()


def archive(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive as the kernel reads it (Documentation/driver-api/early-userspace/buffer-format.rst).

    :param files: path -> mode and contents; directories are made as needed, links have S_IFLNK in their mode.
    """
    entries: dict[str, tuple[int, bytes]] = {}
    for path, (mode, contents) in files.items():
        for parent in reversed(Path(path).parents):
            if str(parent) != ".":
                entries.setdefault(str(parent), (stat.S_IFDIR | 0o755, b""))
        entries[path] = (mode if stat.S_IFMT(mode) else stat.S_IFREG | mode, contents)
    parts = [_entry(number, *entry) for number, entry in enumerate(entries.items(), start=1)]
    return b"".join([*parts, _entry(0, "TRAILER!!!", (0, b""))])


def _entry(inode: int, path: str, entry: tuple[int, bytes]) -> bytes:
    mode, contents = entry
    name = os.fsencode(path) + b"\0"
    # inode mode uid gid links mtime size device(major minor) special(major minor) length of the name, checksum
    numbers = (inode, mode, 0, 0, 1, 0, len(contents), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % number for number in numbers) + name
    return header + bytes(-len(header) % 4) + contents + bytes(-len(contents) % 4)


def _build(kernel: Kernel) -> bytes:
    modules = _load_order(kernel)
    order = "".join(f"{name} {OPTIONS.get(name, '')}\n" for name in modules)
    files = {
        "init": (0o755, INIT.read_bytes()),
        "bin/busybox": (0o755, kernel.busybox.read_bytes()),
        "modules/order": (0o644, order.encode()),
    }
    for name, contents in modules.items():
        files[f"modules/{name}.ko"] = (0o644, contents)
    return archive(files)


def _load_order(kernel: Kernel) -> dict[str, bytes]:
    """MODULES and all that they depend on, each after its dependencies.

    :raise LabError: a module is neither in the kernel nor among its modules.
    """
    files = {_canonical(file.name.partition(".ko")[0]): file for file in kernel.modules.rglob("*.ko*")}
    builtin = {_canonical(Path(line).stem) for line in (kernel.modules / "modules.builtin").read_text().split()}
    order: dict[str, bytes] = {}

    def add(names: Iterable[str]) -> None:
        for name in names:
            if name in order or _canonical(name) in builtin:
                continue
            if _canonical(name) not in files:
                raise LabError(f"kernel {kernel.release} has no module {name}")
            contents = _read(files[_canonical(name)])
            add(_dependencies(contents))
            order[name] = contents

    add(MODULES)
    return order


def _canonical(module: str) -> str:
    """Files and metadata disagree on dashes and underscores."""
    return module.replace("-", "_")


def _dependencies(module: bytes) -> list[str]:
    """The module's own word on what it needs, from its .modinfo section."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name for name in found[1].decode().split(",") if name] if found else []


def _read(module: Path) -> bytes:
    contents = module.read_bytes()
    return lzma.decompress(contents) if module.suffix == ".xz" else contents
