"""
The journal: what a hop is about to do and has done, for the recovery that has to finish it or roll it back.

One file for each hop in progress, in ``/var/lib/sevhop/journal``. Its first line is a :class:`HopRecord`; every further
one adds the fields that are new, and is written *before* the step that they announce. Each line is JSON; a last one
that is torn was never acted upon, and is ignored.

Before anything of the guest is touched, the file is on the disk: written under another name, synchronised, linked into
place, the directory synchronised. Its blocks are allocated then, too, so that a full disk is found early. Further lines
are not waited for: they are in the page cache at once, where they survive this process, and a thread flushes them, but
not while the guest is stopped. When the host crashes the guest is lost as well; then the journal need only record
that a hop was in progress, which its first line does.

The process that hops holds a lock on the file (flock(2)), which the kernel drops when it exits. So a journal without a
lock is that of an interrupted hop.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shlex
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Self

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.invalid_data import invalid

from .hop_record import PREPARED, VERSION, HopRecord, Process
from .run_directory import HopInProgress

#: Where journals are; root's alone.
DIRECTORY = Path("/var/lib/sevhop/journal")

_ROOM = 64 << 10
_SUFFIX = ".journal"


class JournalError(SevhopError):
    """The journal cannot be written, or is damaged."""


class HopInterrupted(JournalError):
    """An earlier hop of this guest was interrupted, or is prepared, and must be recovered first."""


class Journal:
    """
    The journal of a hop, locked by this process. :meth:`begin` or :meth:`take_over`, then :meth:`end`.
    """

    def __init__(self, path: Path, fd: int, record: HopRecord, size: int) -> None:
        self.path = path
        self._record = record
        self._new_fields: dict[str, Any] = {}
        self._fd = fd
        self._size = size
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._flush: Future[None] | None = None

    @property
    def record(self) -> HopRecord:
        """The record, with all fields that were written so far."""
        if self._new_fields:
            self._record, self._new_fields = replace(self._record, **self._new_fields), {}
        return self._record

    @classmethod
    def begin(cls, record: HopRecord) -> Self:
        """
        Write the first line, and wait until it is on the disk.

        :raises HopInProgress: another command is hopping this guest.
        :raises HopInterrupted: an earlier hop was interrupted.
        :raises JournalError: it cannot be written; the disk may be full.
        """
        expect_none(record.source)
        try:
            DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = DIRECTORY / f"{record.key}{_SUFFIX}"
            temporary = DIRECTORY / f".{secrets.token_hex(16)}"
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as err:
            raise _write_error(err) from err
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.posix_fallocate(fd, 0, _ROOM)
            line = _line(asdict(record))
            os.pwrite(fd, line, 0)
            os.fsync(fd)
            # link(), unlike rename(), fails if there is a journal of this guest already.
            os.link(temporary, path)
            _sync(DIRECTORY)
        except FileExistsError as err:
            os.close(fd)
            raise _existing_hop(path) from err
        except OSError as err:
            os.close(fd)
            raise _write_error(err) from err
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return cls(path, fd, record, len(line))

    @classmethod
    def take_over(cls, path: Path) -> Self:
        """
        Continue the journal of an interrupted hop.

        :raises HopInProgress: another process has it locked.
        :raises JournalError: it cannot be read.
        """
        fd = _locked(path, os.O_RDWR)
        try:
            record, size = _read(os.pread(fd, os.fstat(fd).st_size, 0), path)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, record, size)

    @classmethod
    def take_over_unreadable(cls, path: Path, record: HopRecord) -> Self:
        """
        The same for a journal that cannot be read, and is only to be removed.

        :param record: what is known of the hop otherwise.
        :raises HopInProgress: another process has it locked.
        :raises JournalError: it cannot be opened, or can be read.
        """
        fd = _locked(path, os.O_RDONLY)
        if not is_unreadable(path):
            os.close(fd)
            raise JournalError(f"the journal {path} can be read", "run: sevhop recover")
        return cls(path, fd, record, 0)

    def write(self, fields: Mapping[str, Any], *, flush: bool = True) -> None:
        """
        Append what is about to be done, or has become known. From now on it survives this process; the disk is not
        waited for.

        :param flush: flush it now, not with a later line.
        :raises JournalError: it cannot be written.
        """
        line = _line({name: asdict(value) if isinstance(value, Process) else value for name, value in fields.items()})
        try:
            os.pwrite(self._fd, line, self._size)
        except OSError as err:
            raise _write_error(err) from err
        self._size += len(line)
        self._new_fields.update(fields)
        if flush and (self._flush is None or self._flush.done()):
            self._flush = self._flusher.submit(_flush, self._fd)

    def end(self) -> None:
        """The hop is over, with nothing left to recover: remove the journal."""
        with contextlib.suppress(OSError):
            self.path.unlink()
            _sync(DIRECTORY)
        self.leave()

    def leave(self) -> None:
        """Unlock it; it stays for :mod:`sevhop.engine.recovery`."""
        self._flusher.shutdown()
        os.close(self._fd)


def expect_none(guest: Process | str) -> None:
    """
    Verify that no hop of a guest is in progress or was interrupted.

    :param guest: its QEMU, which may be the destination of that hop; or the UUID of a domain, or the name of one that
        libvirt does not know; or the absolute path of the QMP socket of a QEMU that may be halted, and so not answer.
    :raises HopInProgress: another command is hopping this guest.
    :raises HopInterrupted: an earlier hop was interrupted.
    """
    for path in journals():
        try:
            record = read(path)
        except JournalError:
            continue
        known_as = (record.uuid, record.guest) if record.kind == "domain" else (record.monitor,)
        if guest in (record.source, record.destination, *known_as):
            raise _existing_hop(path)


def unattended() -> list[str]:
    """
    The domains whose hop was interrupted, or is prepared, in this boot of the host.

    :raises JournalError: it is unknown which hops there are.
    """
    names = []
    for path in journals():
        with contextlib.suppress(JournalError):
            record = read(path)
            if record.kind == "domain" and record.this_boot and not in_progress(path):
                names.append(record.guest)
    return names


def journals() -> Iterator[Path]:
    """
    The journals of all hops that are in progress or were interrupted.

    :raises JournalError: it is unknown which there are.
    """
    try:
        names = sorted(os.listdir(DIRECTORY))
    except FileNotFoundError:
        return
    except OSError as err:
        hint = "run sevhop as root" if isinstance(err, PermissionError) else f"see what {DIRECTORY} is"
        raise JournalError(f"cannot read the journals in {DIRECTORY}: {err.strerror}", hint) from err
    for name in names:
        if name.endswith(_SUFFIX):
            yield DIRECTORY / name


def is_unreadable(path: Path) -> bool:
    """Whether a journal is there, and damaged or of another version."""
    try:
        read(path)
    except JournalError:
        return path.exists()  # its hop has not just ended
    return False


def read(path: Path) -> HopRecord:
    """
    The record of a journal, locked or not.

    :raises JournalError: it cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise JournalError(f"cannot read the journal {path}: {err.strerror}") from err
    return _read(raw, path)[0]


def remove_unfinished() -> None:
    """Remove temporary files of commands that died before their journal was linked; such a hop has touched nothing."""
    with contextlib.suppress(OSError):
        for name in os.listdir(DIRECTORY):
            path = DIRECTORY / name
            if name.startswith(".") and not in_progress(path):
                path.unlink()


def _read(raw: bytes, path: Path) -> tuple[HopRecord, int]:
    """The record, and the offset after the last whole line."""
    # After the last line come the allocated blocks, all zero.
    text, newline, _ = raw.partition(b"\0")[0].rpartition(b"\n")
    try:
        first, *rest = text.split(b"\n")
        values = json.loads(first)
        if values["version"] != VERSION:
            raise JournalError(
                f"cannot read the journal {path}: its version {json.dumps(values['version'])} is not supported",
                "recover with the version of sevhop that began the hop",
            )
        known = {one.name for one in fields(HopRecord)}
        source = Process(**values.pop("source"))
        others = {name: values.pop(name) for name in ("destination", "transit")}
        record = HopRecord(source=source, **{name: values[name] for name in known - {"source", *others}})
        record = record.with_fields(others)
        for line in rest:
            changed = json.loads(line)
            if not isinstance(changed, dict):
                raise TypeError("a line is no object")
            record = record.with_fields(changed)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise JournalError(
            f"cannot read the journal {path}: {invalid(err)}",
            "find out where the guest is; to remove what its hop has left: "
            f"sevhop recover {shlex.quote(path.name)} --discard",
        ) from err
    return record, len(text) + len(newline)


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _flush(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.fdatasync(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def in_progress(path: Path) -> bool:
    """Whether the command that writes a journal, or a recovery, is alive."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _locked(path: Path, flags: int) -> int:
    """
    A descriptor that has the lock.

    :raises HopInProgress: another process has it.
    :raises JournalError: it cannot be opened.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as err:
        raise JournalError(f"cannot read the journal {path}: {err.strerror}") from err
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(fd).st_nlink:
            raise JournalError(f"cannot recover the hop of {path}: it has just finished", "nothing is to be done")
    except BlockingIOError as err:
        os.close(fd)
        raise _existing_hop(path) from err
    except BaseException:
        os.close(fd)
        raise
    return fd


def _existing_hop(path: Path) -> SevhopError:
    try:
        record = read(path)
    except JournalError as err:
        return err
    if in_progress(path):
        return HopInProgress(f"process {record.command} is hopping {record.guest}", "wait for it; see sevhop status")
    what = f'an earlier hop of {record.guest} was interrupted in phase "{record.phase or "acquire"}"'
    if record.phase == PREPARED:
        what = f"an upgrade of {record.guest} was prepared, and is not finished"
    return HopInterrupted(what, f"run: sevhop recover {shlex.quote(record.guest)}")


def _write_error(err: OSError) -> JournalError:
    return JournalError(
        f"cannot write the journal in {DIRECTORY}: {err.strerror}", f"make {DIRECTORY} writable, with room for it"
    )
