"""
The journal: what a hop is about to do and has done, for the recovery that has to finish it or roll it back.

One file for each hop in progress, in ``/var/lib/sevhop/journal``. Its first line is a :class:`HopRecord`; every further
one adds the fields that are new, and is written *before* the step that they announce. Each line is JSON; a last one
that is torn was never acted upon, and is ignored.

Before anything of the guest is touched, the file is on the disk: written under another name, synchronised, linked into
place, the directory synchronised. Its blocks are allocated then, too, so that a full disk is found early. Further lines
are not waited for: they are in the page cache at once, where they survive this process, and a thread flushes them, but
not while the guest is stopped. When the host crashes the guest is lost as well; then the journal need only tell that a
hop was in progress, which its first line does.

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
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from .run_directory import HopInProgress

#: Where journals are; root's alone.
DIRECTORY = Path("/var/lib/sevhop/journal")
#: Of the format. A journal of another version is refused.
VERSION = 1

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ROOM = 64 << 10
#: Above the limit of any kernel.
_MOST_PIDS = 1 << 31
_SUFFIX = ".journal"


class JournalError(SevhopError):
    """The journal cannot be written, or is damaged."""


class HopInterrupted(JournalError):
    """An earlier hop of this guest was interrupted, and must be recovered first."""


@dataclass(frozen=True)
class Process:
    """
    A process, distinguished from a later one with the same pid.

    :ivar started: clock ticks since boot (``/proc/PID/stat``, field 22).
    """

    pid: int
    started: int

    def __post_init__(self) -> None:
        """:raises ValueError: there can be no such process."""
        if not (isinstance(self.pid, int) and isinstance(self.started, int) and 0 < self.pid < _MOST_PIDS):
            raise ValueError(f"{self.pid!r}, started at {self.started!r}, is no process")

    @classmethod
    def of(cls, process: QemuProcess) -> Self:
        """:raises ProcessError: it has exited."""
        return cls(process.pid, process.start_time)

    def open(self) -> QemuProcess | None:
        """The process; None if it has exited."""
        with contextlib.suppress(SevhopError):
            process = QemuProcess.open(self.pid)
            with contextlib.suppress(SevhopError):
                if process.alive and process.start_time == self.started:
                    return process
            process.close()
        return None


@dataclass(frozen=True)
class HopRecord:
    """
    All that a recovery must know of a hop.

    :ivar kind: ``standalone`` or ``domain``.
    :ivar guest: its name, for messages.
    :ivar command: pid of the process that wrote this, for messages.
    :ivar boot: the boot of the host in which it began (``/proc/sys/kernel/random/boot_id``).
    :ivar context: ``none``, ``sev`` or ``sev-es``.
    :ivar running: whether the guest ran when the hop began.
    :ivar stopped: whether a rollback resumes it in the source: the hop has stopped it, or is about to.
    :ivar source: its QEMU.
    :ivar monitor: standalone: path of the source's QMP socket.
    :ivar uri, uuid: domain: the daemon, and the domain there.
    :ivar old, new: emulators.
    :ivar protected_state: offset of the source's flag that may be cleared for the time of the stop, see
        :mod:`sevhop_qmp.protected_state`; 0 if there is none.
    :ivar directory: of the hop below ``/run/sevhop``: the destination's monitor, or the keeper.
    :ivar destination: standalone: the new QEMU.
    :ivar run_mark: standalone: inode of the mark that records whether the guest has run there, which the source has
        open, too; see :mod:`sevhop_qmp.run_mark`.
    :ivar phase: the last one that was begun.
    :ivar loaded: standalone: all state of the guest is loaded in the destination.
    :ivar committed: there is no rollback any more.
    :ivar broken: why the destination must not run although the context is there.
    :ivar oom_score_adj: standalone: the source's, which the destination gets when it has the guest.
    :ivar guest_paths: standalone: paths that must lead to the destination after the hop; see
        :mod:`sevhop.engine.guest_paths`.
    """

    kind: str
    guest: str
    context: str
    running: bool
    source: Process
    monitor: str = ""
    uri: str = ""
    uuid: str = ""
    old: str = ""
    new: str = ""
    protected_state: int = 0
    directory: str = ""
    destination: Process | None = None
    run_mark: int = 0
    phase: str = ""
    stopped: bool = False
    loaded: bool = False
    committed: bool = False
    broken: str = ""
    guest_paths: dict[str, Any] = field(default_factory=dict)
    oom_score_adj: int = 0
    version: int = VERSION
    command: int = field(default_factory=os.getpid)
    boot: str = field(default_factory=lambda: _BOOT_ID.read_text().strip())

    def __post_init__(self) -> None:
        """:raises ValueError: a field has an invalid value."""
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, _TYPES[one.type]) or (isinstance(value, str) and "\0" in value):
                raise ValueError(f"{one.name} cannot be {value!r}")

    @property
    def key(self) -> str:
        """The identity of the guest, as a file name."""
        return f"domain-{self.uuid}" if self.kind == "domain" else f"process-{self.source.pid}-{self.source.started}"

    @property
    def this_boot(self) -> bool:
        """Whether the host has not been rebooted since."""
        return self.boot == _BOOT_ID.read_text().strip()

    def with_fields(self, changed: dict[str, Any]) -> Self:
        """
        The record with the fields of a further line.

        :raises JournalError: these are no fields of a record.
        """
        try:
            for name in ("source", "destination"):
                if changed.get(name) is not None:
                    changed = changed | {name: Process(**changed[name])}
            new = replace(self, **changed)
        except (TypeError, ValueError) as err:
            raise JournalError(f"the journal has an invalid field: {err}") from err
        return new


#: Of the fields, by annotation.
_TYPES: dict[Any, Any] = {
    "str": str,
    "bool": bool,
    "int": int,
    "dict[str, Any]": dict,
    "Process": Process,
    "Process | None": Process | None,
}


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
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as err:
            raise JournalError(f"{path}: {err.strerror}") from err
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raw = os.pread(fd, os.fstat(fd).st_size, 0)
            if not os.fstat(fd).st_nlink:
                raise JournalError(f"{path}: the hop has just finished")
            record, size = _read(raw, path)
        except BlockingIOError as err:
            os.close(fd)
            raise _existing_hop(path) from err
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, record, size)

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

    :param guest: its QEMU, which may be the destination of that hop; or the UUID of a domain; or the absolute path of
        the QMP socket of a QEMU that may be halted, and so not answer.
    :raises HopInProgress: another command is hopping this guest.
    :raises HopInterrupted: an earlier hop was interrupted.
    """
    for path in journals():
        try:
            record = read(path)
        except JournalError:
            continue
        if guest in (record.source, record.destination, record.uuid if record.kind == "domain" else record.monitor):
            raise _existing_hop(path)


def journals() -> Iterator[Path]:
    """The journals of all hops that are in progress or were interrupted."""
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(DIRECTORY)):
            if name.endswith(_SUFFIX):
                yield DIRECTORY / name


def read(path: Path) -> HopRecord:
    """
    The record of a journal, locked or not.

    :raises JournalError: it cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise JournalError(f"{path}: {err.strerror}") from err
    return _read(raw, path)[0]


def remove_unfinished() -> None:
    """Remove temporary files of commands that died before their journal was linked; such a hop has touched nothing."""
    with contextlib.suppress(OSError):
        for name in os.listdir(DIRECTORY):
            path = DIRECTORY / name
            if name.startswith(".") and not _locked(path):
                path.unlink()


def _read(raw: bytes, path: Path) -> tuple[HopRecord, int]:
    """The record, and the offset after the last whole line."""
    # After the last line come the allocated blocks, all zero.
    text, newline, _ = raw.partition(b"\0")[0].rpartition(b"\n")
    try:
        first, *rest = text.split(b"\n")
        values = json.loads(first)
        if values["version"] != VERSION:
            raise JournalError(f"{path}: version {values['version']!r} of the journal is not supported")
        known = {one.name for one in fields(HopRecord)}
        source = Process(**values.pop("source"))
        destination = values.pop("destination")
        record = HopRecord(source=source, **{name: values[name] for name in known - {"source", "destination"}})
        record = record.with_fields({"destination": destination})
        for line in rest:
            changed = json.loads(line)
            if not isinstance(changed, dict):
                raise TypeError("a line is no object")
            record = record.with_fields(changed)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise JournalError(
            f"{path} cannot be read: {err!r}", "manual action required: inspect the journal and the guest"
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


def _locked(path: Path) -> bool:
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


def _existing_hop(path: Path) -> SevhopError:
    try:
        record = read(path)
    except JournalError as err:
        return err
    if _locked(path):
        return HopInProgress(f"process {record.command} is hopping {record.guest}", "wait for it; see sevhop status")
    return HopInterrupted(
        f'an earlier hop of {record.guest} was interrupted in phase "{record.phase or "acquire"}"',
        f"run: sevhop recover {shlex.quote(record.guest)}",
    )


def _write_error(err: OSError) -> JournalError:
    return JournalError(f"the journal in {DIRECTORY} cannot be written: {err.strerror}")
