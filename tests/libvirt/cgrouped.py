"""Cgroups of a domain as libvirt makes them, which the tests' own daemon does not: it has none that it may manage."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from sevhop.process.scheduling import cgroup_directory
from sevhop_qmp.errors import SevhopError

from tests.support.guests.build import Unavailable
from tests.support.guests.daemon import DomainGuest
from tests.support.guests.running import wait_until

#: Controllers (cgroup v1) → a setting, and its value.
_SETTINGS = {"cpu": ("cpu.cfs_quota_us", "90000"), "pids": ("pids.max", "500"), "cpuset": ("cpuset.cpus", "0")}
#: The same for cgroup v2, as far as its controllers are enabled.
_UNIFIED = {"cpu.max": "90000 100000", "pids.max": "500"}


class MachineCgroups:
    """
    The cgroups of one domain. Use :meth:`made`.

    :ivar tops: controllers → directory of the domain's cgroup.
    """

    def __init__(self, guest: DomainGuest) -> None:
        self._name = f"qemu-1-{guest.name}.libvirt-qemu"
        self.tops: dict[str, Path] = {}

    @classmethod
    @contextlib.contextmanager
    def made(cls, guest: DomainGuest) -> Iterator[MachineCgroups]:
        """
        Put the QEMU of a domain into cgroups: its vCPU into one, the rest into another.

        :raises Unavailable: none can be made here.
        """
        self = cls(guest)
        pid = guest.pid
        try:
            for row in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
                _, controllers, path = row.split(":", 2)
                with contextlib.suppress(SevhopError, OSError):
                    if controllers in ("", *_SETTINGS):
                        self._make(controllers, cgroup_directory(controllers, path), pid)
            if not self.tops:
                raise Unavailable("no cgroup can be made here")
            yield self
        finally:
            self.remove()

    def _make(self, controllers: str, root: Path, pid: int) -> None:
        parent = root / "sevhop-test.machine"
        top = parent / self._name
        inner = top / "libvirt" if controllers == "" else top
        for group in (parent, top, *([inner] if inner != top else []), inner / "emulator", inner / "vcpu0"):
            group.mkdir(exist_ok=True)
            for name in ("cpuset.mems", "cpuset.cpus") if controllers == "cpuset" else ():
                (group / name).write_text((group.parent / name).read_text())
        if controllers == "":
            (inner / "cgroup.procs").write_text(str(pid))
            for name in ("emulator", "vcpu0"):
                (inner / name / "cgroup.type").write_text("threaded")
        else:
            name, value = _SETTINGS[controllers]
            (inner / "vcpu0" / name).write_text(value)
        (inner / "emulator" / "cgroup.procs").write_text(str(pid))
        for thread in Path(f"/proc/{pid}/task").iterdir():
            if re.match(r"CPU \d+/", (thread / "comm").read_text()):
                tasks = inner / "vcpu0" / ("cgroup.threads" if controllers == "" else "tasks")
                tasks.write_text(thread.name)
        self.tops[controllers] = top

    def remove(self) -> None:
        """As libvirt does when the domain is shut off; nothing is in there any more."""
        for top in self.tops.values():
            groups = sorted((path for path in top.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
            for group in [*groups, top]:
                wait_until(lambda group=group: _removed(group), 10, f"{group} is empty")  # type: ignore[misc]
            with contextlib.suppress(OSError):
                top.parent.rmdir()
        self.tops.clear()


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def groups_of(pid: int) -> dict[str, dict[str, str]]:
    """Name of a thread → controllers → its cgroup, of the first thread and the vCPUs."""
    found = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        name = (thread / "comm").read_text().strip()
        if thread.name == str(pid) or name.startswith("CPU "):
            rows = (row.split(":", 2) for row in (thread / "cgroup").read_text().splitlines())
            found["first" if thread.name == str(pid) else name] = {controllers: path for _, controllers, path in rows}
    return found
