"""
The limits for the memory of a domain's cgroup, which a hop gets round.

The kernel charges a page of shared memory to the cgroup that has touched it first. libvirt makes a new cgroup for each
QEMU of a domain, so after a hop the guest's memory is charged to the parent of one that does not exist any more.
"""

from __future__ import annotations

from pathlib import Path

from sevhop_qmp.process import QemuProcess

_ROOT = Path("/sys/fs/cgroup")
#: Files with a limit, and what is in them when there is none (Documentation/admin-guide/cgroup-v{1,2}).
_LIMITS = {"memory.max": "max", "memory.high": "max", "memory.low": "0", "memory.min": "0"}
_OLD_LIMITS = ("memory.limit_in_bytes", "memory.soft_limit_in_bytes")
#: What a hierarchy of the first version has for no limit, or more.
_UNLIMITED = 1 << 62
#: How libvirt, or systemd for it, names the cgroup of a domain.
_OF_DOMAINS = ("machine-qemu", "qemu-")


def limits(process: QemuProcess, root: Path = _ROOT) -> str:
    """
    What is to be told of the limits for a domain's memory; empty when it has none.

    :raises ProcessError: the process has ended.
    """
    for controllers, path in process.cgroups:
        if controllers == "":
            found = [_of(root, path), _of(root / "unified", path)]
        elif "memory" in controllers.split(","):
            found = [_of(root / "memory", path)]
        else:
            continue
        for names in found:
            if names:
                return (
                    f"the guest's memory stays charged to where the cgroup of its old QEMU was, so {', '.join(names)} "
                    "of the new one does not count it until the domain is started the next time"
                )
    return ""


def _of(root: Path, path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    own = next((number for number, part in enumerate(parts) if part.startswith(_OF_DOMAINS)), None)
    if own is None:
        return []
    found = []
    for end in range(own + 1, len(parts) + 1):
        group = root.joinpath(*parts[:end])
        found += [name for name, none in _LIMITS.items() if _read(group / name) not in ("", none)]
        found += [name for name in _OLD_LIMITS if (text := _read(group / name)).isdigit() and int(text) < _UNLIMITED]
    return list(dict.fromkeys(found))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
