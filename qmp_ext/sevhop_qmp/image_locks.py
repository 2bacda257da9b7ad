"""
The locks that a QEMU has on its disk images, read from outside.

QEMU locks a byte of an image file for each permission that it uses (``block/file-posix.c``). It releases these locks
together with its images, when it has saved its state; ``cont`` acquires them again before any vCPU runs, and a
``stop`` after that does not release them. So a source without locks has not run since its state was saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Self

from .open_images import Identity, file_identity
from .process import QemuProcess

#: The byte that stands for writing: RAW_LOCK_PERM_BASE, and the bit of BLK_PERM_WRITE.
_WRITE = 100 + 1
#: ``struct flock``: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")


class ImageLocks:
    """
    Those images of a source that it has locked for writing. Take them while the source has its images.

    :ivar locked: the files.
    """

    def __init__(self, images: list[int], pid: int) -> None:
        self._images = images
        self._pid = pid
        self.locked = frozenset(found for image in images if (found := file_identity(os.fstat(image))) is not None)

    @classmethod
    def of(cls, process: QemuProcess) -> Self:
        """:raises ProcessError: it has exited."""
        images = []
        for descriptor in process.descriptors():
            # Opened again: F_OFD_GETLK does not report the locks of its own open file description.
            path = f"/proc/{process.pid}/fd/{descriptor.number}"
            with contextlib.suppress(OSError):
                mode = os.stat(path).st_mode
                if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                    image = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    if _locked(image):
                        images.append(image)
                    else:
                        os.close(image)
        return cls(images, process.pid)

    @property
    def known(self) -> bool:
        """Whether there are any, so that :attr:`given_up` means something."""
        return bool(self._images)

    @property
    def given_up(self) -> bool:
        """Whether the source has released a lock. One is enough: other images may be locked by other QEMUs."""
        return not all(_locked(image) for image in self._images)

    def kept(self) -> set[Identity]:
        """Those images that the source still has locked for writing."""
        locked = [file_identity(os.fstat(image)) for image in self._images if _locked(image)]
        # An image may be shared with other QEMUs. The owner of a lock is looked up only then.
        return {found for found in locked if found is not None and found in self._own()} if locked else set()

    def _own(self) -> set[Identity]:
        """The files of which the source has a descriptor with that lock (proc(5), ``fdinfo``)."""
        own = set()
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{self._pid}/fdinfo"):
                with contextlib.suppress(OSError):
                    lines = Path(f"/proc/{self._pid}/fdinfo/{name}").read_text().splitlines()
                    # Its pid file is locked as well, but by a lock of another kind.
                    if any("OFDLCK" in line and _covers(line) for line in lines if line.startswith("lock:")):
                        found = file_identity(os.stat(f"/proc/{self._pid}/fd/{name}"))
                        if found is not None:
                            own.add(found)
        return own

    def close(self) -> None:
        """Close the images."""
        while self._images:
            os.close(self._images.pop())


def _covers(line: str) -> bool:
    """Whether a line of fdinfo is a lock on :data:`_WRITE`."""
    first, last = line.split()[-2:]
    return int(first) <= _WRITE and (last == "EOF" or int(last) >= _WRITE)


def _locked(image: int) -> bool:
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _WRITE, 1, 0)
    return bool(_FLOCK.unpack(fcntl.fcntl(image, fcntl.F_OFD_GETLK, wanted))[0] != fcntl.F_UNLCK)
