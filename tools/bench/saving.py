"""``virsh save`` and ``virsh restore``: the memory goes by way of a file, and the downtime grows with it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.guests.daemon import DomainGuest
from tests.support.guests.running import GuestFailed

from .downtime import Sampler, memory_of
from .report import SAVE_RESTORE
from .runs import Outcome, Run
from .usage import Usage, counting

#: Seconds between two polls for the QEMU that libvirt starts.
_POLL = 0.002
_VERSION = ("major", "minor", "micro")


def save_and_restore(guest: DomainGuest, image: Path, usage: Usage | None, machine: str, memory_mib: int) -> Run:
    """
    Save a domain, and restore it in the same emulator.

    :param image: does not exist, and is removed.
    :raises GuestFailed: it did not come back.
    """
    memory = memory_of(guest.pid)
    assert memory is not None
    version = ".".join(str(guest.monitor("query-version")["return"]["qemu"][part]) for part in _VERSION)
    with counting(usage) as used:
        began = time.monotonic()
        with Sampler(memory) as before:
            before.wait()
            guest.daemon.virsh("save", guest.name, image)
            before.stop()
        saved = time.monotonic()
        with _Successor(lambda: _pid(guest)) as successor:
            guest.daemon.virsh("restore", image)
            ended = time.monotonic()
            after = successor.sampler()
    # Writing this image to the disk must not disturb the next run.
    image.unlink()
    os.sync()
    phases = {"save": (saved - began) * 1e3, "restore": (ended - saved) * 1e3}
    outcome = Outcome((before.last, after), began, ended, phases)
    return Run.of((SAVE_RESTORE, machine, memory_mib), outcome, used, version, version)


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
