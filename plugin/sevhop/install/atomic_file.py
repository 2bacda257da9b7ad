"""Writes every file that ``sevhop install`` puts on the host: it is there as a whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from sevhop_qmp.errors import SevhopError


def write(
    path: Path,
    contents: bytes,
    mode: int,
    *,
    beside: Path | None = None,
    keep_owner: bool = False,
    prepare: Callable[[Path], None] = lambda path: None,
) -> None:
    """
    Write a file, or replace the one that is there.

    :param beside: directory of the same file system for the temporary file; by default that of ``path``. It must be one
        whose files nobody reads or runs.
    :param keep_owner: give the new file the owner, group and mode of the one that it replaces, if there is one.
    :param prepare: called with the temporary file before that takes its place.
    :raises SevhopError: it cannot be written; then the old one is still there.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=beside or path.parent, prefix=".sevhop-", delete=False) as file:
            try:
                file.write(contents)
                file.flush()
                os.fchmod(file.fileno(), mode)
                if keep_owner:
                    _copy_owner(path, file.fileno())
                prepare(Path(file.name))
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as err:
        hint = (
            "run sevhop as root" if isinstance(err, PermissionError) else f"see what {path.parent} is, and free space"
        )
        raise SevhopError(f"cannot write {path}: {err.strerror}", hint) from err


def _copy_owner(path: Path, fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        old = path.stat()
        os.fchown(fd, old.st_uid, old.st_gid)
        os.fchmod(fd, stat.S_IMODE(old.st_mode))
