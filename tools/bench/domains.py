"""
Methods to move a libvirt domain into another QEMU process: ``sevhop upgrade``, and ``virsh save`` with ``restore``.

They alternate with one domain in a private daemon. An upgrade goes to the other of the two emulators; save and restore
stay in the domain's emulator, since they cannot change it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.guests import emulators
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.machine import Accelerator
from tests.support.guests.running import GuestFailed

from .downtime import Sampler, memory_of, touch
from .report import Failed, Outcome, Run
from .usage import Usage, counting

UPGRADE, SAVE_RESTORE = "upgrade", "save-restore"
#: Seconds between two polls for the QEMU that libvirt starts.
_POLL = 0.002
#: Calls of the hook for a domain that is in no hop.
_FOREIGN_CALLS = 20


class Domains:
    """
    Measures domains in a daemon. A context manager.

    :param images: directory of the save images; on a disk, as usual.
    :param usage: counts processor time and memory; None where that is not possible.
    """

    def __init__(self, accelerator: Accelerator, images: Path, usage: Usage | None = None) -> None:
        self._accelerator = accelerator
        self._usage = usage
        self._image = images / "domain.save"
        self._old, self._new = (emulators.emulator(label) for label in (emulators.OLD, emulators.NEW))
        self._daemon = Daemon.start()

    def __enter__(self) -> Domains:
        try:
            self._daemon.install()
        except BaseException:
            self._daemon.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.stop()
        self._image.unlink(missing_ok=True)

    def measure(self, memory_mib: int, rounds: int) -> Iterator[Run | Failed]:
        """All runs with one size of memory; a round is an upgrade to the other emulator, one back, and two saves."""
        try:
            yield from self._runs(memory_mib, rounds)
        except GuestFailed as err:
            yield Failed(UPGRADE, "domain", memory_mib, str(err))

    def _runs(self, memory_mib: int, rounds: int) -> Iterator[Run]:
        description = Description(f"bench-{memory_mib}", self._old, self._accelerator, memory_mib=memory_mib)
        guest = DomainGuest.start(self._daemon, description)
        try:
            guest.wait_for_ticks()
            memory = memory_of(guest.pid)
            assert memory is not None
            touch(memory)
            # The first use of an emulator takes libvirt longer, and fills the page cache.
            for emulator in (self._new, self._old):
                self._upgrade(guest, emulator, memory_mib)
            for _ in range(rounds):
                for emulator in (self._new, self._old):
                    yield self._upgrade(guest, emulator, memory_mib)
                    yield self._save_and_restore(guest, memory_mib)
            guest.wait_for_ticks()
        finally:
            guest.end()

    def _upgrade(self, guest: DomainGuest, emulator: Path, memory_mib: int) -> Run:
        memory = memory_of(guest.pid)
        assert memory is not None
        with Sampler(memory) as sampler, counting(self._usage) as used:
            sampler.wait()
            began = time.monotonic()
            report = guest.daemon.upgrade(guest.name, "--emulator", emulator)
            ended = time.monotonic()
            if report["outcome"] != "done":
                raise GuestFailed(f"upgrade: {report['reason']}")
            sampler.see_growth()
            sampler.stop()
        phases = {phase["name"]: phase["ms"] for phase in report["phases"]}
        outcome = Outcome(sampler.longest, began, ended, phases)
        versions = (report["source"]["version"], report["destination"]["version"])
        return Run.of((UPGRADE, "domain", memory_mib), outcome, used, *versions)

    def _save_and_restore(self, guest: DomainGuest, memory_mib: int) -> Run:
        memory = memory_of(guest.pid)
        assert memory is not None
        version = ".".join(str(guest.monitor("query-version")["return"]["qemu"][part]) for part in _VERSION)
        with counting(self._usage) as used:
            began = time.monotonic()
            with Sampler(memory) as before:
                before.wait()
                self._daemon.virsh("save", guest.name, self._image)
                before.stop()
            saved = time.monotonic()
            with _Successor(lambda: _pid(guest)) as successor:
                self._daemon.virsh("restore", self._image)
                ended = time.monotonic()
                after = successor.sampler()
        # Writing this image to the disk must not disturb the next run.
        self._image.unlink()
        os.sync()
        phases = {"save": (saved - began) * 1e3, "restore": (ended - saved) * 1e3}
        outcome = Outcome((before.last, after), began, ended, phases)
        return Run.of((SAVE_RESTORE, "domain", memory_mib), outcome, used, version, version)

    def hook_of_a_foreign_domain(self) -> list[float]:
        """Milliseconds of each call of the hook for a domain that is in no hop."""
        script = "/etc/libvirt/hooks/qemu.d/sevhop"
        code = "import subprocess, sys, time\nfor n in range(int(sys.argv[1])):\n    t = time.monotonic()\n"
        code += "    subprocess.run([sys.argv[2], 'other', 'started', 'begin', '-'], input=b'', check=True)\n"
        code += "    print((time.monotonic() - t) * 1e3)\n"
        done = self._daemon.run("python3", "-c", code, str(_FOREIGN_CALLS), script)
        if done.returncode:
            raise GuestFailed(f"the hook of a domain that is in no hop: {done.stderr.strip()}")
        return [float(line) for line in done.stdout.split()]


_VERSION = ("major", "minor", "micro")


def _pid(guest: DomainGuest) -> int | None:
    try:
        return guest.pid
    except (OSError, ValueError):
        return None


class _Successor:
    """Waits for the QEMU that libvirt starts, and samples the memory of its guest. A context manager."""

    def __init__(self, pid: Callable[[], int | None]) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._sampler: Sampler | None = None
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> _Successor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._sampler is not None:
            self._sampler.__exit__(None, None, None)

    def sampler(self) -> int:
        """When the guest ran, ns."""
        self._ended.set()
        self._thread.join()
        if self._sampler is None:
            raise GuestFailed("cannot find the restored guest")
        self._sampler.wait()
        return self._sampler.began

    def _poll(self) -> None:
        while self._sampler is None:
            pid = self._pid()
            memory = None if pid is None else memory_of(pid)
            if memory is not None:
                self._sampler = Sampler(memory)
            elif self._ended.wait(_POLL):
                return
