"""
The program of a running QEMU, kept as a file that libvirt can start when its own file was replaced or removed.

While the process lives, its program can be read from ``/proc/PID/exe`` (proc(5)), and the modules that it has loaded
from ``/proc/PID/map_files``. A copy of both is an emulator like any other::

    /var/lib/sevhop/emulators/DOMAIN/emulator/usr/bin/qemu-system-x86_64    what the domain's XML names
                                     program/qemu-system-x86_64             the program
                                     program/qemu-bundle/...                where it looks for firmware and modules

QEMU looks below ``qemu-bundle`` if that is beside its program (``get_relocated_path`` in its util/cutils.c), and
nowhere else. So it finds the modules of its own build, and not those of the new package: the second module of another
build that it opens ends it by an assertion. Firmware has no build: there are links to the directories of the host.

Only root can write here, and only what only root could write is copied.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from sevhop_qmp import selinux
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import OnDisk, QemuProcess, path_on_disk

from . import emulator, kept_path

#: Of all kept programs.
DIRECTORY = Path(kept_path.DIRECTORY)
_BUNDLE = "qemu-bundle"
_MODULE = re.compile(r"/(?:.+/)?qemu[^/]*/[^/]+\.so")
#: Some distributions have TCG in a module, which a QEMU with KVM does not load. It cannot be kept then, and the program
#: ends where it is wanted. libvirt wants it when it probes an emulator; what that finds of TCG does not matter to KVM.
_WRAPPER = """#!/bin/sh
for argument; do
    shift
    case $argument in none,accel=tcg*) argument=none,accel=kvm ;; esac
    set -- "$@" "$argument"
done
exec {program} "$@"
"""


def keep(process: QemuProcess, kept: str) -> None:
    """
    Copy the program of a running QEMU.

    :param kept: from :func:`.kept_path.place`.
    :raises SevhopError: that cannot be had, or does not start on this host any more; nothing is left of it.
    """
    try:
        _make(process, kept)
    except OSError as err:
        forget(kept)
        raise SevhopError(f"cannot keep its program in {DIRECTORY}: {err.strerror}") from err
    except BaseException:
        forget(kept)
        raise


def on_disk(process: QemuProcess, path: str) -> OnDisk:
    """
    What has become of the file that a QEMU was started from; of the original one if its program is kept.

    :param path: the emulator in the XML of its domain.
    :raises ProcessError: the process has exited.
    """
    if (before := kept_path.original(path)) == path:
        return process.on_disk
    return OnDisk.REPLACED if os.path.exists(before) else OnDisk.DELETED


def forget(path: str) -> None:
    """Remove a program that was kept, if it is there; nothing if the path is not one of :func:`.kept_path.place`."""
    if directory := kept_path.directory(path):
        remove(directory)


def directories() -> list[str]:
    """Those of all kept programs. What uses one has this in a path."""
    with contextlib.suppress(OSError):
        return [str(DIRECTORY / name) for name in sorted(os.listdir(DIRECTORY))]
    return []


def remove(directory: str) -> None:
    """Remove one of :func:`directories`. A process that runs the program is not affected."""
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        DIRECTORY.rmdir()


def running() -> Iterator[str]:
    """The programs of all processes that run a kept one."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                program = os.readlink(f"/proc/{name}/exe")
                if program.startswith(f"{DIRECTORY}/"):
                    yield program


def _make(process: QemuProcess, kept: str) -> None:
    """:raises OSError: the process has exited, or the disk is full, or the like."""
    top, path = Path(kept_path.directory(kept)), Path(kept)
    was = Path(path_on_disk(process.executable))
    program = top / "program" / was.name
    bundle = program.with_name(_BUNDLE)
    for directory in (bundle, path.parent):
        directory.mkdir(parents=True)
    for directory in (DIRECTORY.parent, DIRECTORY):
        directory.chmod(0o711)
    _copy(f"/proc/{process.pid}/exe", program)
    os.symlink(program, path)
    # Of a QEMU that has a directory of this kind itself, the same paths are below that one.
    own = was.with_name(_BUNDLE).resolve()
    for name, mapped in _modules(process).items():
        inside = Path(name).relative_to(own if own.is_dir() and Path(name).is_relative_to(own) else "/")
        (bundle / inside).parent.mkdir(parents=True, exist_ok=True)
        _copy(mapped, bundle / inside)
    _open_directories(top)
    for inside in _firmware(program, bundle):
        target = next((one for one in (own / inside, Path("/") / inside) if one.is_dir()), None)
        if target is not None and not (bundle / inside).exists():
            (bundle / inside).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(target, bundle / inside)
    _open_directories(top)
    try:
        emulator.probe(kept)
    except SevhopError:
        path.unlink()
        path.write_text(_WRAPPER.format(program=shlex.quote(str(program))))
        path.chmod(0o755)
        emulator.probe(kept)


def _modules(process: QemuProcess) -> dict[str, str]:
    """The modules that a QEMU has loaded: path → where the kernel shows the file, whatever became of that path."""
    found: dict[str, str] = {}
    for one in process.mappings():
        path = path_on_disk(one.path)
        if _MODULE.fullmatch(path):
            found.setdefault(path, f"/proc/{process.pid}/map_files/{one.start:x}-{one.end:x}")
    return found


def _copy(source: str, path: Path) -> None:
    """
    :raises SevhopError: another user than root could have written it.
    :raises OSError: the process has exited, or the disk is full.
    """
    with open(source, "rb") as file, open(path, "xb") as copy:
        if who := emulator.other_owner(os.fstat(file.fileno())):
            raise SevhopError(f"its program cannot be trusted with a guest: {who}")
        shutil.copyfileobj(file, copy, 1 << 20)
        os.fchmod(copy.fileno(), 0o755)
        # Only with its label may libvirt start it.
        selinux.copy_label(file.fileno(), copy.fileno())


def _firmware(program: Path, bundle: Path) -> list[Path]:
    """
    The directories in which a program looks for firmware, relative to its bundle.

    :raises SevhopError: it does not start, or looks elsewhere, and so for modules as well.
    """
    try:
        done = subprocess.run(
            [program, "-L", "help"], capture_output=True, text=True, timeout=emulator.PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise SevhopError(f"its program does not answer within {emulator.PATIENCE:g} s") from err
    except (OSError, subprocess.SubprocessError) as err:
        raise SevhopError(f"its program does not start any more: {getattr(err, 'strerror', None) or err}") from err
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise SevhopError(f"its program does not start any more: {reason}")
    found = [Path(line) for line in done.stdout.splitlines() if line.startswith(f"{bundle}/")]
    if not found:
        raise SevhopError(f"its program does not look for firmware and modules in {_BUNDLE}")
    return [one.relative_to(bundle) for one in found]


def _open_directories(top: Path) -> None:
    """QEMU's user may read and search them, whatever our umask is."""
    for directory, names, _ in os.walk(top):
        os.chmod(directory, stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
        names[:] = [name for name in names if not os.path.islink(os.path.join(directory, name))]
