"""
The reboot mark of a domain: records that its QEMU has shut down because the guest was to be reset.

A moved guest may be one that cannot be reset (:mod:`sevhop.guest.reboot`). Its reboot is a shutdown, to libvirt as
well: the domain would stay off, although its ``<on_reboot>`` is ``restart``. So before such a guest runs in its
new QEMU, that is given a mark, which adopt.so sets at a shutdown that was to be a reset. libvirt's hook finds it when
the QEMU has exited, and has the domain started (:mod:`sevhop.libvirt.hook`). Nobody waits for that meanwhile. The
keeper makes it in its commit (:mod:`sevhop.keeper.domain_reboot`).

Below ``/run/sevhop/reboot``, root's alone, each of these domains has a directory of its name. In it are

``mark``    one byte, 1 after such a shutdown. The QEMU has a mapping of it, and no descriptor
``domain``  UUID and URI of the domain, which no QEMU can write
"""

from __future__ import annotations

import contextlib
import os
import shutil

from .run_directory import REBOOTS, RunDirectoryError, make_or_check, make_run_directories


def make(name: str, uuid: str, uri: str) -> int:
    """
    Make the mark of a domain, in the place of an earlier one.

    :param uri: of the daemon.
    :return: a descriptor of it.
    :raises RunDirectoryError: it cannot be made.
    """
    make_run_directories()
    make_or_check(REBOOTS, 0o700)
    remove(name)
    directory = REBOOTS / name
    try:
        directory.mkdir(mode=0o700)
        (directory / "domain").write_text(f"{uuid} {uri}")
        fd = os.open(directory / "mark", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.write(fd, b"\0")
    except OSError as err:
        remove(name)
        raise RunDirectoryError(f"cannot make {directory}: {err.strerror}", f"see what is in {REBOOTS}") from err
    return fd


def remove(name: str) -> None:
    """Remove the mark of a domain, if it has one."""
    shutil.rmtree(REBOOTS / name, ignore_errors=True)


def names() -> list[str]:
    """The domains that have a mark."""
    with contextlib.suppress(OSError):
        return sorted(path.name for path in REBOOTS.iterdir() if (path / "mark").exists())
    return []


def remove_all() -> None:
    """Remove all marks: no domain is started again any more."""
    shutil.rmtree(REBOOTS, ignore_errors=True)
