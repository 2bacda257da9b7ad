"""
The locks that a QEMU has on its disk images, seen from outside.

QEMU locks a byte of an image file for each permission that it makes use of (``block/file-posix.c``). It gives these
locks up together with its images, when it has saved its state; ``cont`` takes them back before any vCPU runs, and a
``stop`` after that does not give them up again. So a source without locks has not run since its state was saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from typing import Self

from .process import QemuProcess

#: The byte that stands for writing: RAW_LOCK_PERM_BASE, and the bit of BLK_PERM_WRITE.
_WRITE = 100 + 1
#: ``struct flock``: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")


class ImageLocks:
    """Those images of a source that it has locked for writing. Take them while the source has its images."""

    def __init__(self, images: list[int]) -> None:
        self._images = images

    @classmethod
    def of(cls, process: QemuProcess) -> Self:
        """:raises ProcessError: it has ended."""
        images = []
        for descriptor in process.descriptors():
            # Opened anew: what a duplicate has locked is not seen through it.
            path = f"/proc/{process.pid}/fd/{descriptor.number}"
            with contextlib.suppress(OSError):
                mode = os.stat(path).st_mode
                if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                    image = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    if _locked(image):
                        images.append(image)
                    else:
                        os.close(image)
        return cls(images)

    @property
    def known(self) -> bool:
        """Whether there are any, so that they tell something."""
        return bool(self._images)

    @property
    def given_up(self) -> bool:
        """Whether the source has not got its images. One is enough: others may be shared with other QEMUs."""
        return not all(_locked(image) for image in self._images)

    def close(self) -> None:
        """Let go of the images."""
        while self._images:
            os.close(self._images.pop())


def _locked(image: int) -> bool:
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _WRITE, 1, 0)
    return bool(_FLOCK.unpack(fcntl.fcntl(image, fcntl.F_OFD_GETLK, wanted))[0] != fcntl.F_UNLCK)
