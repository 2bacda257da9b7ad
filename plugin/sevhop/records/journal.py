"""
The journal: what a hop is about to do and has done, for whoever has to finish it or undo it after a crash.

One file for each hop under way, in ``/var/lib/sevhop/journal``. Its first line is an :class:`Entry`; every further one
adds the facts that are new, and is written *before* the step that they announce. Each line is JSON; a last one that is
torn was never acted upon, and is ignored.

Before anything of the guest is touched, the file is on the disk: written under another name, synchronised, linked into
place, the directory synchronised. The room for all that follows is allocated then, too, so that a full disk is found
early. Of what follows nobody waits until it is on the disk: it is in the kernel's hands at once, where the death of
this process cannot touch it, and a thread takes it to the disk, while the guest is stopped not even that. The host's
death ends the guest as well; then the journal need only tell that a hop was under way, which its first line does.

The process that hops holds a lock on the file (flock(2)), which the kernel drops with the process. So a journal
without a lock is that of a hop that was broken off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from .run_directory import HopUnderWay

#: Where journals are; root's alone.
DIRECTORY = Path("/var/lib/sevhop/journal")
#: Of the format. A journal of another version is left alone.
VERSION = 1

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ROOM = 64 << 10
#: No kernel has as many.
_MOST_PIDS = 1 << 31
_SUFFIX = ".journal"


class JournalError(SevhopError):
    """The journal cannot be written, or what it says cannot be read."""


class HopBrokenOff(JournalError):
    """An earlier hop of this guest was broken off, and must be recovered first."""


@dataclass(frozen=True)
class Process:
    """
    A process, told apart from a later one with the same pid.

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
        """:raises ProcessError: it has ended."""
        return cls(process.pid, process.start_time)

    def open(self) -> QemuProcess | None:
        """The process, if it is still there; None if it has ended."""
        with contextlib.suppress(SevhopError):
            process = QemuProcess.open(self.pid)
            with contextlib.suppress(SevhopError):
                if process.alive and process.start_time == self.started:
                    return process
            process.close()
        return None


@dataclass(frozen=True)
class Entry:
    """
    What is known of a hop.

    :ivar kind: ``bare`` or ``domain``.
    :ivar guest: its name, for people.
    :ivar command: the process that wrote this, for people.
    :ivar boot: of which boot of the host (``/proc/sys/kernel/random/boot_id``).
    :ivar context: ``none``, ``sev`` or ``sev-es``.
    :ivar running: whether the guest ran when the hop began.
    :ivar stopped: whether it is to be resumed if it goes on in the source: the hop has stopped it, or is about to.
    :ivar source: its QEMU.
    :ivar monitor: bare: path of the source's QMP socket.
    :ivar uri, uuid: domain: where libvirt has it.
    :ivar old, new: emulators.
    :ivar directory: of the hop below ``/run/sevhop``: the destination's monitor, or the keeper.
    :ivar destination: bare: the new QEMU.
    :ivar run_mark: bare: inode of the mark that tells whether the guest has run there, which the source holds, too; see
        :mod:`sevhop_qmp.run_mark`.
    :ivar phase: the last one that was begun.
    :ivar loaded: bare: all of the guest is in the destination.
    :ivar committed: there is no way back.
    :ivar broken: why the destination must not run although the context is there.
    :ivar oom_score_adj: bare: the source's, which the destination gets when it has the guest.
    :ivar plates: bare: paths that must lead to the destination in the end; see :mod:`sevhop.engine.guest_paths`.
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
    directory: str = ""
    destination: Process | None = None
    run_mark: int = 0
    phase: str = ""
    stopped: bool = False
    loaded: bool = False
    committed: bool = False
    broken: str = ""
    plates: dict[str, Any] = field(default_factory=dict)
    oom_score_adj: int = 0
    version: int = VERSION
    command: int = field(default_factory=os.getpid)
    boot: str = field(default_factory=lambda: _BOOT_ID.read_text().strip())

    def __post_init__(self) -> None:
        """:raises ValueError: a fact is none."""
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, _TYPES[one.type]) or (isinstance(value, str) and "\0" in value):
                raise ValueError(f"{one.name} cannot be {value!r}")

    @property
    def key(self) -> str:
        """What tells this guest from all others, as a file name."""
        return f"domain-{self.uuid}" if self.kind == "domain" else f"process-{self.source.pid}-{self.source.started}"

    @property
    def this_boot(self) -> bool:
        """Whether the host has not been started anew since."""
        return self.boot == _BOOT_ID.read_text().strip()

    def with_facts(self, facts: dict[str, Any]) -> Self:
        """
        The entry, and what has become known since.

        :raises JournalError: these are no facts of an entry.
        """
        try:
            for name in ("source", "destination"):
                if facts.get(name) is not None:
                    facts = facts | {name: Process(**facts[name])}
            new = replace(self, **facts)
        except (TypeError, ValueError) as err:
            raise JournalError(f"the journal says something unknown: {err}") from err
        return new


#: By annotation.
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
    The journal of a hop, while this process has it. :meth:`begin` or :meth:`take_over`, then :meth:`end`.
    """

    def __init__(self, path: Path, fd: int, entry: Entry, size: int) -> None:
        self.path = path
        self._entry = entry
        self._since: dict[str, Any] = {}
        self._fd = fd
        self._size = size
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._flush: Future[None] | None = None

    @property
    def entry(self) -> Entry:
        """All that was written so far."""
        if self._since:
            self._entry, self._since = replace(self._entry, **self._since), {}
        return self._entry

    @classmethod
    def begin(cls, entry: Entry) -> Self:
        """
        Write down that a hop begins, and wait until that is on the disk.

        :raises HopUnderWay: another command is hopping this guest.
        :raises HopBrokenOff: an earlier one did not come to an end.
        :raises JournalError: it cannot be written; the disk may be full.
        """
        expect_none(entry.source)
        try:
            DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = DIRECTORY / f"{entry.key}{_SUFFIX}"
            temporary = DIRECTORY / f".{secrets.token_hex(16)}"
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as err:
            raise _unwritable(err) from err
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.posix_fallocate(fd, 0, _ROOM)
            line = _line(asdict(entry))
            os.pwrite(fd, line, 0)
            os.fsync(fd)
            # A link, unlike a rename, fails when there is a journal of this guest already.
            os.link(temporary, path)
            _sync(DIRECTORY)
        except FileExistsError as err:
            os.close(fd)
            raise _held_by_another(path) from err
        except OSError as err:
            os.close(fd)
            raise _unwritable(err) from err
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return cls(path, fd, entry, len(line))

    @classmethod
    def take_over(cls, path: Path) -> Self:
        """
        Go on with the journal of a hop that was broken off.

        :raises HopUnderWay: it was not, a process is at it.
        :raises JournalError: what it says cannot be read.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as err:
            raise JournalError(f"{path}: {err.strerror}") from err
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raw = os.pread(fd, os.fstat(fd).st_size, 0)
            if not os.fstat(fd).st_nlink:
                raise JournalError(f"{path}: it has just come to its end")
            entry, size = _read(raw, path)
        except BlockingIOError as err:
            os.close(fd)
            raise _held_by_another(path) from err
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, entry, size)

    def write(self, facts: Mapping[str, Any], *, flush: bool = True) -> None:
        """
        Write down what is about to be done, or has become known. Survives this process from now on; the disk is not
        waited for.

        :param flush: take it to the disk now, not with a later record.
        :raises JournalError: it cannot be written.
        """
        line = _line({name: asdict(fact) if isinstance(fact, Process) else fact for name, fact in facts.items()})
        try:
            os.pwrite(self._fd, line, self._size)
        except OSError as err:
            raise _unwritable(err) from err
        self._size += len(line)
        self._since.update(facts)
        if flush and (self._flush is None or self._flush.done()):
            self._flush = self._flusher.submit(_flush, self._fd)

    def end(self) -> None:
        """There is nothing left to finish or to undo."""
        with contextlib.suppress(OSError):
            self.path.unlink()
            _sync(DIRECTORY)
        self.leave()

    def leave(self) -> None:
        """Let go of it; it stays for :mod:`sevhop.engine.recovery`."""
        self._flusher.shutdown()
        os.close(self._fd)


def expect_none(guest: Process | str) -> None:
    """
    See that no hop of a guest is under way or broken off.

    :param guest: its QEMU, which may be the destination of that hop; or the UUID of a domain; or the absolute path of
        the QMP socket of a QEMU that may be halted, and so tell nothing.
    :raises HopUnderWay: another command is hopping this guest.
    :raises HopBrokenOff: an earlier one did not come to an end.
    """
    for path in journals():
        try:
            entry = read(path)
        except JournalError:
            continue
        if guest in (entry.source, entry.destination, entry.uuid if entry.kind == "domain" else entry.monitor):
            raise _held_by_another(path)


def journals() -> Iterator[Path]:
    """The journals of all hops under way or broken off."""
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(DIRECTORY)):
            if name.endswith(_SUFFIX):
                yield DIRECTORY / name


def read(path: Path) -> Entry:
    """
    What a journal says, whoever has it.

    :raises JournalError: that cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise JournalError(f"{path}: {err.strerror}") from err
    return _read(raw, path)[0]


def remove_unfinished() -> None:
    """Remove what commands have left that died before their journal was in place; such a hop has touched nothing."""
    with contextlib.suppress(OSError):
        for name in os.listdir(DIRECTORY):
            path = DIRECTORY / name
            if name.startswith(".") and not _locked(path):
                path.unlink()


def _read(raw: bytes, path: Path) -> tuple[Entry, int]:
    """The entry, and the offset behind the last whole line."""
    # Behind the last line is the room that was allocated, all zero.
    text, newline, _ = raw.partition(b"\0")[0].rpartition(b"\n")
    try:
        first, *rest = text.split(b"\n")
        told = json.loads(first)
        if told["version"] != VERSION:
            raise JournalError(f"{path}: version {told['version']!r} of the journal is not known here")
        known = {one.name for one in fields(Entry)}
        source = Process(**told.pop("source"))
        destination = told.pop("destination")
        entry = Entry(source=source, **{name: told[name] for name in known - {"source", "destination"}})
        entry = entry.with_facts({"destination": destination})
        for line in rest:
            facts = json.loads(line)
            if not isinstance(facts, dict):
                raise TypeError("a line is no object")
            entry = entry.with_facts(facts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise JournalError(f"{path} cannot be read: {err!r}", "look at it, and at the guest, by hand") from err
    return entry, len(text) + len(newline)


def _line(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts).encode() + b"\n"


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


def _held_by_another(path: Path) -> SevhopError:
    try:
        entry = read(path)
    except JournalError as err:
        return err
    if _locked(path):
        return HopUnderWay(f"process {entry.command} is hopping {entry.guest}", "wait for it; see sevhop status")
    return HopBrokenOff(
        f"an earlier hop of {entry.guest} was not finished, it stands at {entry.phase or 'hold'}", "run: sevhop recover"
    )


def _unwritable(err: OSError) -> JournalError:
    return JournalError(f"the journal in {DIRECTORY} cannot be written: {err.strerror}")
